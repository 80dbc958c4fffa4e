"""Faults under a real federation at random moments: no round may be lost, and the result must stay the same.

    python tests/faults/process_faults.py --faults 10 --seed 0
    sudo python tests/faults/process_faults.py --hosts --disk 256 --do kill hang cut fill

On loopback, or with `--hosts` each process on a host of its own (a network namespace with its own address): TLS and node keys from
`ckd-fed cluster init`, a SuperLink, a teacher node for image and one for text, student nodes; each with a data directory that holds only
what its role may have, and a workspace of its own. One run is left alone. Then runs are disturbed, every few seconds by one fault:

- kill: a process gets SIGKILL (a SuperNode with the ClientApp it is running, only a ClientApp, the SuperLink, the ServerApp), and is
  started again as a service manager would;
- hang: it is stopped for a while (SIGSTOP), and goes on;
- cut: its host's cable is pulled for a while;
- fill: the disk of a node's workspace or of the server's runs is full for a while.

A run that failed is resumed. Every run's rows and parameters must equal the undisturbed one's.

Nothing outside its temporary directory is touched, and only processes that it started are killed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from cluster import BIN, ROOT, Cluster, Undo

from ckd_fed.checkpoint import load_checkpoint
from ckd_fed.tracking.record import read_rows

FAULTS = ("kill", "hang", "cut", "fill")
QUICK = "training.threads=1 training.validate-every=2 federation.retry-pause=2 federation.retry-limit=20 federation.enrol-timeout=300"
_PATIENCE = 900.0  # seconds for a run between two signs of life


class Run:
    """One run of the app, followed by its own directory (the connection may be down while the run goes on)."""

    def __init__(self, cluster: Cluster, name: str, overrides: str) -> None:
        self.cluster, self.name, self.overrides = cluster, name, overrides
        self.directory = cluster.home / "server/runs" / name
        self.resumes = 0
        self.started = time.monotonic()
        self.submit(f'name="{name}" {overrides}')

    def age(self) -> float:
        """Seconds since it was first submitted."""
        return time.monotonic() - self.started

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


class Faults:
    """Faults to come: what may happen to whom, when, and for how long.

    Args:
        cluster: who suffers them.
        wanted: how many.
        seed: of everything that is drawn.
        kinds: of :data:`FAULTS`.
        victims: who; everybody if empty.
        gap: seconds between two, from and to.
        hold: seconds that those last which end by themselves, from and to.
    """

    def __init__(
        self, cluster: Cluster, wanted: int, seed: int, kinds: list[str], victims: list[str], gap: tuple[float, float], hold: tuple[float, float]
    ) -> None:
        self.cluster, self.wanted, self.gap, self.hold = cluster, wanted, gap, hold
        self.draw = random.Random(seed)
        self.could = {kind: [name for name in cluster.victims(kind) if not victims or name in victims] for kind in kinds}
        empty = [kind for kind, names in self.could.items() if not names]
        if empty:
            raise SystemExit(
                f"nobody named can suffer {empty[0]!r}: cut needs --hosts, fill needs --disk; victims of kill: {', '.join(cluster.victims('kill'))}"
            )
        self.happened: Counter[str] = Counter()
        self.due = 0.0
        self._ends: list[tuple[float, str, Undo]] = []

    def await_next(self) -> None:
        self.due = time.monotonic() + self.draw.uniform(*self.gap)

    def left(self) -> bool:
        """Whether some are still to come."""
        return self.happened.total() < self.wanted

    def pass_time(self, run: Run) -> bool:
        """End what has lasted long enough, and let the next happen if it is due; whether anything was done."""
        over = [end for end in self._ends if time.monotonic() >= end[0]]
        for end in over:
            self._end(end)
        if not self.left() or time.monotonic() < self.due:
            return bool(over)
        fault = self.draw.choice(list(self.could))
        victim = self.draw.choice(self.could[fault])
        if any(victim == name.split()[1] for _, name, _ in self._ends):
            return bool(over)
        undo = self.cluster.inflict(fault, victim, self.draw)
        if undo is None:
            return bool(over)
        self.happened[f"{fault} {victim}"] += 1
        seconds = 0.0 if fault == "kill" else self.draw.uniform(*self.hold)
        print(
            f"  {run.age():6.0f} s  {fault} {victim}{f' for {seconds:.0f} s' if seconds else ''} after round {run.rounds()} "
            f"({self.happened.total()} of {self.wanted})",
            flush=True,
        )
        self._ends.append((time.monotonic() + seconds, f"{fault} {victim}", undo))
        self.await_next()
        return True

    def end_all(self) -> None:
        """End whatever still lasts."""
        for end in list(self._ends):
            self._end(end)

    def _end(self, end: tuple[float, str, Undo]) -> None:
        end[2]()
        self._ends.remove(end)


def follow(run: Run, faults: Faults | None) -> None:
    """See a run to its end, under faults."""
    cluster = run.cluster
    if faults:
        faults.await_next()
    sign, seen = time.monotonic(), run.rounds()
    looked = 0.0
    while not run.finished():
        cluster.supervise()
        if faults and faults.pass_time(run):
            sign = time.monotonic()
        if time.monotonic() - looked > 20 and time.monotonic() - run.submitted > 10:
            looked = time.monotonic()
            if run.failed() and not run.finished():
                run.resume()
                print(f"  {run.age():6.0f} s  resumed after round {run.rounds()}", flush=True)
                sign = time.monotonic()
        if run.rounds() != seen:
            sign, seen = time.monotonic(), run.rounds()
        if time.monotonic() - sign > _PATIENCE:
            raise SystemExit(f"run {run.name} has given no sign of life for {_PATIENCE:.0f} s; see {cluster.home}")
        time.sleep(1)
    if faults:
        faults.end_all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30, help="how many")
    parser.add_argument("--do", nargs="+", choices=FAULTS, default=["kill"], help="which kinds")
    parser.add_argument("--victims", nargs="+", default=[], help="whom; by default everybody")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    parser.add_argument("--epochs", type=int, default=8, help="of each run")
    parser.add_argument("--students", type=int, default=2)
    parser.add_argument("--gap", type=float, nargs=2, default=(15.0, 90.0), metavar=("FROM", "TO"), help="seconds between two faults")
    parser.add_argument("--hold", type=float, nargs=2, default=(10.0, 60.0), metavar=("FROM", "TO"), help="seconds that hang, cut and fill last")
    parser.add_argument("--hosts", action="store_true", help="each process on a host of its own, by network namespaces (root)")
    parser.add_argument("--disk", type=int, default=0, metavar="MB", help="size of each node's and the server's disk (root)")
    parser.add_argument("--data", type=Path, help="a dataset's folder with image and text features; by default the stand-in is generated")
    parser.add_argument("-c", "--config", default="", help="overrides of every run; with --faults 0 only the undisturbed one takes place")
    parser.add_argument("--keep", action="store_true", help="keep the directory with all logs")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # whoever ends this script ends its processes
    home = Path(tempfile.mkdtemp(prefix="ckd-faults-"))
    overrides = f"{QUICK} training.epochs={chosen.epochs} federation.teacher-epochs=4 federation.student-workers={chosen.students}"
    keys = dict(pair.split("=", 1) for pair in f"{overrides} {chosen.config}".split())  # the last of a key counts
    overrides = " ".join(f"{key}={value}" for key, value in keys.items())
    cluster = Cluster(home, chosen.students, chosen.hosts, chosen.disk)
    runs = resumes = lost = 0
    wrong: list[str] = []
    try:
        faults = Faults(cluster, chosen.faults, chosen.seed, chosen.do, chosen.victims, tuple(chosen.gap), tuple(chosen.hold))
        cluster.lay_out_data(chosen.data)
        cluster.start_all()
        print(f"logs in {home}; the undisturbed run", flush=True)
        reference = Run(cluster, "undisturbed", overrides)
        follow(reference, None)
        print(f"  {reference.age():6.0f} s, {reference.rounds()} rounds{summary(reference.directory)}", flush=True)
        while faults.left():
            runs += 1
            print(f"disturbed run {runs}", flush=True)
            run = Run(cluster, f"disturbed-{runs}", overrides)
            follow(run, faults)
            lost += reference.rounds() - run.rounds()
            found = differences(run.directory, reference.directory)
            print(f"  {run.age():6.0f} s, {run.resumes} resumes; {'equal' if not found else f'DIFFERENT: {found[:3]}'}", flush=True)
            wrong += [f"{run.name}: {line}" for line in found]
            resumes += run.resumes
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # asked twice to end, it still ends what it started
        cluster.stop()
        if not chosen.keep and not wrong:
            shutil.rmtree(home, ignore_errors=True)
    what = ", ".join(f"{name} {number}" for name, number in sorted(faults.happened.items()))
    print(f"faults: {faults.happened.total()} ({what}) in {runs} runs, {resumes} resumes, {lost} rounds lost, {len(wrong)} numbers different")
    sys.exit(1 if wrong or lost else 0)


if __name__ == "__main__":
    main()
