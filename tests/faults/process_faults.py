"""Processes of a real federation killed with SIGKILL at random moments: no round may be lost, and the result must stay the same.

    python tests/faults/process_faults.py --faults 10 --seed 0

On loopback, with TLS and node keys from `ckd-fed cluster init`: a SuperLink, a teacher node for image and one for text, student nodes; each
with a data directory that holds only what its role may have, and a workspace of its own. One run is left alone. Then runs are disturbed:
every few seconds one process is killed (a SuperNode with the ClientApp it is running, only the ClientApp, the SuperLink, the ServerApp) and
started again as a service manager would. A run that failed is resumed. Every run's rows and parameters must equal the undisturbed one's.

Nothing outside its temporary directory is touched, and only processes that it started are killed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from ckd_fed.checkpoint import load_checkpoint  # noqa: E402
from ckd_fed.data.dataset import SPLITS  # noqa: E402
from ckd_fed.data.standin import generate_standin  # noqa: E402
from ckd_fed.deploy.cluster import init_cluster  # noqa: E402
from ckd_fed.deploy.plan import ClusterPlan, plan_nodes  # noqa: E402
from ckd_fed.tracking.record import read_rows  # noqa: E402

BIN = Path(sys.executable).parent
KINDS = ("teacher-image", "teacher-text", "student-0", "clientapp", "serverapp", "superlink")
QUICK = "training.threads=1 training.validate-every=2 federation.retry-pause=2 federation.retry-limit=20 federation.enrol-timeout=300"
_RESTART = 10.0  # seconds between two starts of the same process
_PATIENCE = 900.0  # seconds for a run between two signs of life


class Processes:
    """The processes of a cluster, each in a group of its own, started again when they end."""

    def __init__(self, home: Path, students: int) -> None:
        self.home = home
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(home / "flwr"),
            "CKD_FED_HOME": str(home / "server"),
            "WANDB_MODE": "offline",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
        }
        nodes = plan_nodes("image,text", students, f"{home}/data/{{name}}", {}, f"{home}/nodes/{{name}}")
        ports = free_ports(1 + len(nodes))
        nodes = tuple(type(node)(**{**vars(node), "port": port}) for node, port in zip(nodes, ports[1:], strict=True))
        self.plan = ClusterPlan("faults", ("localhost", "127.0.0.1"), ports[0], nodes, bind="127.0.0.1")
        init_cluster(home / "cluster", self.plan, lambda line: None)
        (home / "flwr").mkdir()
        shutil.copy(home / "cluster/operator/connection.toml", home / "flwr/config.toml")
        self.scripts = {"superlink": home / "cluster/superlink/superlink.sh"}
        self.scripts |= {node.name: home / "cluster/nodes" / node.name / "supernode.sh" for node in nodes}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.again: dict[str, float] = {}

    def lay_out_data(self, source: Path | None) -> None:
        """Give each node the split and the features of its role, and nothing else; by default of the stand-in."""
        source = source or generate_standin(self.home / "standin")
        for node in self.plan.nodes:
            folder = Path(node.data_dir)
            folder.mkdir(parents=True)
            for file in source.iterdir():
                modality = file.name.rpartition("_")[0]
                wanted = file.stem in SPLITS or modality == node.modality or (node.role == "student" and modality in ("image", "text"))
                if file.suffix in (".json", ".npy") and wanted:
                    shutil.copy(file, folder / file.name)

    def start(self, name: str) -> None:
        """Start a process and what belongs to it in a new group."""
        with (self.home / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                ["bash", str(self.scripts[name])], stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def start_all(self) -> None:
        self.start("superlink")
        self.await_superlink()
        for node in self.plan.nodes:
            self.flower("supernode", "register", str(self.home / f"cluster/operator/keys/{node.name}.pub"), "faults", "--name", node.name)
            self.start(node.name)

    def await_superlink(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", self.plan.port)) == 0:
                    return
            time.sleep(0.5)
        raise SystemExit(f"the SuperLink did not come up; see {self.home}/superlink.log")

    def flower(self, *arguments: str) -> None:
        subprocess.run([str(BIN / "flwr"), *arguments], env=self.environment, check=True, capture_output=True, timeout=120)

    def supervise(self) -> None:
        """Start again whatever has ended (a SuperNode that was killed is refused for about a minute, and ends each time)."""
        for name, process in list(self.running.items()):
            if process.poll() is not None and time.monotonic() > self.again.get(name, 0.0):
                self.again[name] = time.monotonic() + _RESTART
                self.start(name)

    def kill(self, kind: str, draw: random.Random) -> str | None:
        """SIGKILL; what was killed, or None if there was no such process at this moment."""
        if kind in self.running:
            group = self.running[kind].pid
            os.killpg(group, signal.SIGKILL)
            self.running[kind].wait()
            return kind
        word = {"clientapp": "flwr-clientapp", "serverapp": "flwr-serverapp"}[kind]
        found = [pid for pid, command in self.descendants() if word in command]
        if not found:
            return None
        os.kill(draw.choice(found), signal.SIGKILL)
        return kind

    def stop(self) -> None:
        for process in self.running.values():
            try:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()
        for pid, _ in self.descendants():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def descendants(self) -> list[tuple[int, str]]:
        """(pid, command line) of all processes that carry this cluster's environment; Flower puts some into groups of their own."""
        mark = f"CKD_FED_HOME={self.home}/server".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append((int(entry.name), command))
            except OSError:
                continue
        return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at the moment."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Run:
    """One run of the app, followed by its own directory (the connection may be down while the run goes on)."""

    def __init__(self, cluster: Processes, name: str, overrides: str) -> None:
        self.cluster, self.name, self.overrides = cluster, name, overrides
        self.directory = cluster.home / "server/runs" / name
        self.resumes = 0
        self.started = time.monotonic()
        self.submit(f'name="{name}" {overrides}')

    def submit(self, override: str) -> None:
        """Submit until the SuperLink takes it."""
        command = [str(BIN / "flwr"), "run", str(ROOT / "simulations/baby"), "faults", "-c", override, "--format", "json"]
        for _ in range(30):
            self.cluster.supervise()
            done = subprocess.run(command, env=self.cluster.environment, capture_output=True, text=True, timeout=120, check=False)
            if '"run-id"' in done.stdout:
                self.flower_run = done.stdout.partition('"run-id"')[2].partition('"')[2].partition('"')[0]
                self.submitted = time.monotonic()
                return
            time.sleep(3)
        raise SystemExit(f"flwr run failed: {done.stdout} {done.stderr}")

    def rounds(self) -> int:
        path = self.directory / "metrics.jsonl"
        return sum(row["event"] == "round" for row in read_rows(path)) if path.is_file() else 0

    def finished(self) -> bool:
        path = self.directory / "metrics.jsonl"
        rows = read_rows(path) if path.is_file() else []
        return bool(rows) and rows[-1]["event"] == "final"

    def failed(self) -> bool:
        """Whether Flower gave the run up."""
        command = [str(BIN / "flwr"), "ls", "faults", "--run-id", self.flower_run, "--format", "json"]
        done = subprocess.run(command, env=self.cluster.environment, capture_output=True, text=True, timeout=120, check=False)
        return "finished:failed" in done.stdout or "finished:stopped" in done.stdout

    def resume(self) -> None:
        self.resumes += 1
        state = self.directory / "checkpoints/state.safetensors"
        if state.is_file():
            self.submit(f'resume="{self.name}"')
        else:  # it failed before its nodes were enrolled, so there is nothing to go on with
            shutil.rmtree(self.directory, ignore_errors=True)
            self.submit(f'name="{self.name}" {self.overrides}')


def numbers(directory: Path) -> list[dict[str, object]]:
    """Rows without what differs from process to process."""
    kept = [row for row in read_rows(directory / "metrics.jsonl") if row["event"] in ("round", "validation", "final")]
    return [{key: value for key, value in row.items() if key != "time" and "seconds" not in key and not key.startswith("bytes")} for row in kept]


def differences(directory: Path, reference: Path) -> list[str]:
    """In what two runs differ."""
    ours, theirs = numbers(directory), numbers(reference)
    found = [f"{len(ours)} rows instead of {len(theirs)}"] if len(ours) != len(theirs) else []
    for one, other in zip(ours, theirs, strict=False):
        found += [
            f"{other['event']} {other.get('round')}: {key} {one.get(key)} instead of {other[key]}" for key in other if one.get(key) != other[key]
        ]
    for name in ("best", "last"):
        arrays = [load_checkpoint(path / f"checkpoints/{name}.safetensors")[0] for path in (directory, reference)]
        found += [f"{name} {key}" for key in arrays[1] if not np.array_equal(arrays[0].get(key, np.empty(0)), arrays[1][key])]
    return found


def summary(directory: Path) -> str:
    """What a run's rounds took, and its student's test."""
    rows = read_rows(directory / "metrics.jsonl")
    phases = []
    for phase in ("teachers", "distillation"):
        own = [row for row in rows if row["event"] == "round" and row["phase"] == phase]
        waited = sum(row.get("seconds/messaging", 0.0) for row in own)
        phases.append(f"{phase} {sum(row['seconds'] for row in own):.0f} s" + (f" ({waited:.0f} s of it messaging)" if waited else ""))
    distil = [row for row in rows if row["event"] == "round" and row["phase"] == "distillation"]
    busy = {key: sum(row.get(key, 0.0) for row in distil) for key in sorted(distil[-1]) if key.startswith("seconds/distil/")}
    phases += [f"{key.removeprefix('seconds/distil/')} at work {value:.0f} s" for key, value in busy.items()]
    return "; " + ", ".join(phases) + f"; test Recall@20 {rows[-1]['final/student/test/recall@20']:.4f}"


def follow(run: Run, draw: random.Random, kinds: Sequence[str], gap: tuple[float, float], killed: Counter[str], wanted: int) -> None:
    """See a run to its end, killing something every now and then until enough is killed."""
    cluster = run.cluster
    due = time.monotonic() + draw.uniform(*gap)
    sign, seen = time.monotonic(), run.rounds()
    looked = 0.0
    while not run.finished():
        cluster.supervise()
        if killed.total() < wanted and time.monotonic() >= due:
            phase = f"after round {run.rounds()}"
            what = cluster.kill(draw.choice(kinds), draw)
            if what:
                killed[what] += 1
                print(f"  {time.monotonic() - run.started:6.0f} s  kill -9 {what} {phase} ({killed.total()} of {wanted})", flush=True)
                due = time.monotonic() + draw.uniform(*gap)
                sign = time.monotonic()
        if time.monotonic() - looked > 20 and time.monotonic() - run.submitted > 10:
            looked = time.monotonic()
            if run.failed() and not run.finished():
                run.resume()
                print(f"  {time.monotonic() - run.started:6.0f} s  resumed after round {run.rounds()}", flush=True)
                sign = time.monotonic()
        if run.rounds() != seen:
            sign, seen = time.monotonic(), run.rounds()
        if time.monotonic() - sign > _PATIENCE:
            raise SystemExit(f"run {run.name} has given no sign of life for {_PATIENCE:.0f} s; see {cluster.home}")
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30, help="processes to kill")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    parser.add_argument("--epochs", type=int, default=8, help="of each run")
    parser.add_argument("--students", type=int, default=2)
    parser.add_argument("--gap", type=float, nargs=2, default=(15.0, 90.0), metavar=("FROM", "TO"), help="seconds between two kills")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what may be killed")
    parser.add_argument("--data", type=Path, help="a dataset's folder with image and text features; by default the stand-in is generated")
    parser.add_argument("-c", "--config", default="", help="overrides of every run; with --faults 0 only the undisturbed one takes place")
    parser.add_argument("--keep", action="store_true", help="keep the directory with all logs")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # whoever ends this script ends its processes
    draw = random.Random(chosen.seed)
    home = Path(tempfile.mkdtemp(prefix="ckd-faults-"))
    overrides = f"{QUICK} training.epochs={chosen.epochs} federation.teacher-epochs=4 federation.student-workers={chosen.students}"
    keys = dict(pair.split("=", 1) for pair in f"{overrides} {chosen.config}".split())  # the last of a key counts
    overrides = " ".join(f"{key}={value}" for key, value in keys.items())
    cluster = Processes(home, chosen.students)
    killed: Counter[str] = Counter()
    runs = resumes = lost = 0
    wrong: list[str] = []
    try:
        cluster.lay_out_data(chosen.data)
        cluster.start_all()
        print(f"logs in {home}; the undisturbed run", flush=True)
        reference = Run(cluster, "undisturbed", overrides)
        follow(reference, draw, (), (1e9, 1e9), killed, 0)
        print(f"  {time.monotonic() - reference.started:6.0f} s, {reference.rounds()} rounds{summary(reference.directory)}", flush=True)
        while killed.total() < chosen.faults:
            runs += 1
            print(f"disturbed run {runs}", flush=True)
            run = Run(cluster, f"disturbed-{runs}", overrides)
            follow(run, draw, chosen.kinds, tuple(chosen.gap), killed, chosen.faults)
            lost += reference.rounds() - run.rounds()
            found = differences(run.directory, reference.directory)
            print(
                f"  {time.monotonic() - run.started:6.0f} s, {run.resumes} resumes; {'equal' if not found else f'DIFFERENT: {found[:3]}'}", flush=True
            )
            wrong += [f"{run.name}: {line}" for line in found]
            resumes += run.resumes
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # asked twice to end, it still ends what it started
        cluster.stop()
        if not chosen.keep and not wrong:
            shutil.rmtree(home, ignore_errors=True)
    what = ", ".join(f"{name} {number}" for name, number in sorted(killed.items()))
    print(f"process faults: {killed.total()} ({what}) in {runs} runs, {resumes} resumes, {lost} rounds lost, {len(wrong)} numbers different")
    sys.exit(1 if wrong or lost else 0)


if __name__ == "__main__":
    main()
