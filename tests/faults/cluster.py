"""A real federation on one machine: SuperLink, teacher and student nodes, and what can befall them."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hosts import Hosts  # noqa: E402

from ckd_fed.data.dataset import SPLITS  # noqa: E402
from ckd_fed.data.standin import generate_standin  # noqa: E402
from ckd_fed.deploy.cluster import init_cluster  # noqa: E402
from ckd_fed.deploy.plan import ClusterPlan, plan_nodes  # noqa: E402

BIN = Path(sys.executable).parent
APPS = {"clientapp": "flwr-clientapp", "serverapp": "flwr-serverapp"}  # processes that Flower starts, and how they are told
_RESTART = 10.0  # seconds between two starts of the same process

Undo = Callable[[], None]


class Cluster:
    """The processes of a cluster, each in a group of its own, started again when they end as a service manager would.

    Args:
        home: an empty directory for everything.
        students: how many student nodes.
        hosts: whether each process gets a host of its own (a network namespace; root only) instead of a port on loopback.
        disk_mb: size of the disk of each node's workspace and of the server's runs; 0 for no disks of their own (root only).
    """

    def __init__(self, home: Path, students: int, hosts: bool = False, disk_mb: int = 0) -> None:
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
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._again: dict[str, float] = {}
        self._disks: list[Path] = []
        nodes = plan_nodes("image,text", students, f"{home}/data/{{name}}", {}, f"{home}/nodes/{{name}}")
        ports = free_ports(1 + len(nodes))
        nodes = tuple(type(node)(**{**vars(node), "port": port}) for node, port in zip(nodes, ports[1:], strict=True))
        self.hosts = Hosts(["superlink", *(node.name for node in nodes)]) if hosts else None
        where = (self.hosts.addresses["superlink"],) if self.hosts else ("localhost", "127.0.0.1")
        self.address = where[-1]
        self.plan = ClusterPlan("faults", where, ports[0], nodes, bind=self.address)
        init_cluster(home / "cluster", self.plan, lambda line: None)
        (home / "flwr").mkdir()
        with (home / "flwr/config.toml").open("wb") as file:
            subprocess.run(["bash", str(home / "cluster/operator/connection.sh")], stdout=file, check=True)
        self.scripts = {"superlink": home / "cluster/superlink/superlink.sh"}
        self.scripts |= {node.name: home / "cluster/nodes" / node.name / "supernode.sh" for node in nodes}
        if disk_mb:
            for folder in (home / "server", *(Path(node.home) for node in nodes)):
                folder.mkdir(parents=True)
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={disk_mb}m", "tmpfs", str(folder)], check=True)
                self._disks.append(folder)

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
        """Start a process and what belongs to it in a new group, on its host."""
        place = self.hosts.command(name) if self.hosts else []
        with (self.home / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [*place, "bash", str(self.scripts[name])], stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def start_all(self) -> None:
        """The SuperLink, then every node, registered."""
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
                if probe.connect_ex((self.address, self.plan.port)) == 0:
                    return
            time.sleep(0.5)
        raise SystemExit(f"the SuperLink did not come up; see {self.home}/superlink.log")

    def flower(self, *arguments: str) -> None:
        subprocess.run([str(BIN / "flwr"), *arguments], env=self.environment, check=True, capture_output=True, timeout=120)

    def supervise(self) -> None:
        """Start again whatever has ended (a SuperNode that was killed is refused for about a minute, and ends each time)."""
        for name, process in list(self.running.items()):
            if process.poll() is not None and time.monotonic() > self._again.get(name, 0.0):
                self._again[name] = time.monotonic() + _RESTART
                self.start(name)

    def victims(self, fault: str) -> list[str]:
        """Who can suffer a fault."""
        nodes = [node.name for node in self.plan.nodes]
        return {
            "kill": [*nodes, "superlink", *APPS],
            "hang": [*nodes, "superlink", *APPS],
            "cut": [*nodes, "superlink"] if self.hosts else [],
            "fill": [*nodes, "serverapp"] if self._disks else [],
        }[fault]

    def inflict(self, fault: str, victim: str, draw: random.Random) -> Undo | None:
        """Let a fault happen; what ends it again, or None if there was no such process at this moment."""
        if fault == "cut":
            assert self.hosts
            self.hosts.cut(victim)
            return lambda: self.hosts.mend(victim)
        if fault == "fill":
            return self._fill(self.home / ("server" if victim == "serverapp" else f"nodes/{victim}"))
        if victim in APPS:
            found = [pid for pid, command in self.descendants() if APPS[victim] in command]
            pids = [draw.choice(found)] if found else []
        else:
            pids = self._family(self.running[victim].pid)
        if not pids:
            return None
        if fault == "hang":
            _signal(pids, signal.SIGSTOP)
            return lambda: _signal(pids, signal.SIGCONT)
        _signal(pids, signal.SIGKILL)
        if victim in self.running:
            self.running[victim].wait()
        return lambda: None

    def _family(self, ancestor: int) -> list[int]:
        """A process and all that came of it."""
        parents: dict[int, int] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        family = [ancestor] if ancestor in parents else []
        for pid in family:  # grows on the way
            family += [child for child, parent in parents.items() if parent == pid]
        return family

    def _fill(self, disk: Path) -> Undo:
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        return filler.unlink

    def stop(self) -> None:
        """End every process, and give disks and hosts back."""
        for process in self.running.values():
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _signal([pid for pid, _ in self.descendants()], signal.SIGKILL)
        for disk in self._disks:
            subprocess.run(["umount", "--lazy", str(disk)], check=False)
        if self.hosts:
            self.hosts.remove()

    def descendants(self) -> list[tuple[int, str]]:
        """(pid, command line) of all processes that carry this cluster's environment; Flower puts some into groups of their own."""
        mark = f"CKD_FED_HOME={self.home}/server".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append((int(entry.name), command))
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


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
