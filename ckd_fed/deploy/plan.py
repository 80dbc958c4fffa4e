"""A cluster as planned: its machines, and the exact command of each."""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ckd_fed.config import check_device
from ckd_fed.errors import ConfigError, DataError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_PLACEHOLDER = re.compile(r"\{[^{}]*\}")
_TAKEN = ("default", "local", "supergrid")  # in the config.toml that Flower itself writes; a second one makes all of it unreadable
FIRST_NODE_PORT = 9094  # each SuperNode of a machine serves its ClientApps on a port of its own


@dataclass(frozen=True)
class NodePlan:
    """One node: what it is, where its data are, on which device it trains, and the local port of its SuperNode."""

    name: str
    role: str
    modality: str
    data_dir: str
    device: str
    port: int
    home: str = ""

    def __post_init__(self) -> None:
        for option, value in {"--data-dir": self.data_dir, "--home": self.home}.items():
            if value:
                _check_path(option, value)
        check_device(self.device, f"--device of {self.name}")

    def node_config(self) -> str:
        """As ``flower-supernode --node-config`` takes it: a value ends at the next quote and is read as a TOML string."""
        pairs = {"role": self.role, "modality": self.modality, "data-dir": self.data_dir, "device": self.device, "home": self.home}
        return " ".join(f'{key}="{value}"' for key, value in pairs.items() if value)


@dataclass(frozen=True)
class ClusterPlan:
    """A whole cluster.

    Attributes:
        name: of the connection, as in ``flwr run simulations/baby <name>``.
        hosts: host names and IP addresses of the SuperLink; the first is what nodes are told.
        port: of the SuperLink.
        nodes: teachers and students.
        secure: TLS and node authentication.
        bind: address that the SuperLink listens on.
        install: where the machines' folders will lie on the machines, for the systemd units.
    """

    name: str
    hosts: tuple[str, ...]
    port: int
    nodes: tuple[NodePlan, ...]
    secure: bool = True
    bind: str = "0.0.0.0"
    install: str = "/opt/ckd_fed"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"--name is {self.name!r}; letters, digits, hyphens and underscores are needed")
        if self.name in _TAKEN:
            raise ConfigError(f"--name is {self.name!r}; Flower's own config.toml has that entry, so another name is needed")
        if not self.hosts:
            raise ConfigError("--host is missing; name the machine of the SuperLink as the other machines reach it")
        for host in self.hosts:
            _check_host("--host", host)
        _check_host("--bind", self.bind)
        if not 0 < self.port < 65536:
            raise ConfigError(f"--port is {self.port}; a number from 1 to 65535 is needed")
        _check_path("--install", self.install)
        if ".." in PurePosixPath(self.install).parts:  # systemd takes no such WorkingDirectory
            raise ConfigError(f"--install is {self.install!r}; a path without '..' is needed")

    @property
    def address(self) -> str:
        """Where nodes and users reach the SuperLink."""
        host = f"[{self.hosts[0]}]" if ":" in self.hosts[0] else self.hosts[0]
        return f"{host}:{self.port}"

    @property
    def students(self) -> int:
        """How many student nodes there are."""
        return sum(node.role == "student" for node in self.nodes)

    @property
    def certified_hosts(self) -> tuple[str, ...]:
        """For the server certificate: the SuperLink's own processes reach it by the address it listens on, or by loopback."""
        own = ("127.0.0.1",) if self.bind in ("0.0.0.0", "::") else (self.bind,)
        return tuple(dict.fromkeys([*self.hosts, *own, "localhost"]))

    def superlink_command(self) -> list[str]:
        """To be run in the folder ``superlink``. The database lets registered keys outlive a restart."""
        tls = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key", "--enable-supernode-auth"]
        where = ["--host", self.bind, "--port", str(self.port), "--database", "superlink.db"]
        return ["flower-superlink", *(tls if self.secure else ["--insecure"]), *where]

    def supernode_command(self, node: NodePlan) -> list[str]:
        """To be run in the node's folder."""
        tls = ["--root-certificates", "ca.crt", "--auth-supernode-private-key", "key"] if self.secure else ["--insecure"]
        return ["flower-supernode", *tls, "--superlink", self.address, "--port", str(node.port), "--node-config", node.node_config()]

    def register_command(self, node: NodePlan) -> list[str]:
        """To be run in the folder ``operator``, before the node starts for the first time."""
        return ["flwr", "supernode", "register", f"keys/{node.name}.pub", self.name, "--name", node.name]

    def connection(self, ca: str) -> str:
        """The entry of ``~/.flwr/config.toml``, with the path of the authority's certificate."""
        security = f"root-certificates = {_toml(ca)}" if self.secure else "insecure = true"
        return f"[superlink.{self.name}]\naddress = {_toml(self.address)}\n{security}\n"


def plan_nodes(teachers: str, students: int, data_dir: str, devices: Mapping[str, str], homes: str = "") -> tuple[NodePlan, ...]:
    """Nodes for modalities (one named twice gets a hot spare) and a number of students.

    Args:
        teachers: modalities, comma-separated.
        students: how many student nodes.
        data_dir: of every node; ``{name}`` in it stands for the node's name.
        devices: node name -> device; ``auto`` where nothing is said.
        homes: as data_dir, the nodes' ``home``; empty for each machine's default.

    Raises:
        ConfigError: a value that cannot be used, or that would end up in a file in which it means something else.
    """
    if students < 1:
        raise ConfigError(f"--students is {students}; at least one student node is needed")
    roles: list[tuple[str, str, str]] = []
    for modality in [word.strip() for word in teachers.split(",") if word.strip()]:
        if not _NAME.fullmatch(modality):
            raise ConfigError(f"--teachers names {modality!r}; a modality is letters, digits, hyphens and underscores")
        count = sum(known == modality for _, _, known in roles)
        roles.append((f"teacher-{modality}" + (f"-spare{count}" if count else ""), "teacher", modality))
    if not roles:
        raise ConfigError("--teachers is empty; name the modalities, for example --teachers image,text")
    room = 65536 - FIRST_NODE_PORT - len(roles)
    if students > room:
        raise ConfigError(f"--students is {students}; beside {len(roles)} teachers at most {room} have ports of their own")
    roles += [(f"student-{number}", "student", "") for number in range(students)]
    names = [name for name, _, _ in roles]
    twice = [name for name in names[: len(names) - students] if names.count(name) > 1]
    if twice:
        raise ConfigError(f"--teachers is {teachers!r}; two nodes would be called {twice[0]!r}, so a modality needs another name")
    unknown_names = set(devices) - set(names)
    if unknown_names:
        raise ConfigError(f"--device names {sorted(unknown_names)[0]!r}; the nodes are {', '.join(names)}")
    return tuple(
        NodePlan(
            name,
            role,
            modality,
            _filled("--data-dir", data_dir, name),
            devices.get(name, "auto"),
            FIRST_NODE_PORT + index,
            _filled("--home", homes, name),
        )
        for index, (name, role, modality) in enumerate(roles)
    )


def node_toml(plan: ClusterPlan, node: NodePlan) -> str:
    """The node file: what ``ckd-fed doctor`` looks after."""
    lines = [f"# Node {node.name} of the cluster {plan.name}. supernode.sh holds the same values; change both."]
    lines += [f"name = {_toml(node.name)}", f"role = {_toml(node.role)}"] + ([f"modality = {_toml(node.modality)}"] if node.modality else [])
    lines += [f"data-dir = {_toml(node.data_dir)}", f"device = {_toml(node.device)}"] + ([f"home = {_toml(node.home)}"] if node.home else [])
    lines += [f"superlink = {_toml(plan.address)}", f"secure = {str(plan.secure).lower()}"]
    return "\n".join(lines) + "\n"


def read_node_toml(path: Path) -> dict[str, object]:
    """Read a node file (or the one in a node's folder).

    Raises:
        DataError: it is missing or unreadable.
    """
    path = path / "node.toml" if path.is_dir() else path
    try:
        return {**tomllib.loads(path.read_text()), "folder": str(path.parent.resolve())}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"node file {path} cannot be read: {error}") from None


def shown(command: list[str]) -> str:
    """A command as it is typed."""
    return shlex.join(command)


def _filled(option: str, pattern: str, name: str) -> str:
    """A path with the node's name put in; a placeholder that is none would give all nodes one folder."""
    path = pattern.replace("{name}", name)
    if left := _PLACEHOLDER.search(path):
        raise ConfigError(f"{option} is {pattern!r}, and {left[0]} stands for nothing; what stands for the node's name is {{name}}")
    return path


def _check_path(option: str, value: str) -> None:
    if not value.startswith("/") or any(mark in value for mark in "\"'\\") or not value.isprintable():
        needed = "an absolute path without quotes, backslashes and unprintable characters is needed"
        raise ConfigError(f"{option} is {value!r}; {needed}, as it is on the nodes' machines")


def _check_host(option: str, host: str) -> None:
    if "%" in host:
        raise ConfigError(f"{option} is {host!r}; a scope id (%...) means nothing on another machine, so give a host name or an address without it")
    if not _HOST.fullmatch(host) and not _is_address(host):
        raise ConfigError(f"{option} is {host!r}; a host name or an IP address is needed, without scheme and port")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _toml(text: str) -> str:
    """A TOML string; JSON's escapes are TOML's too."""
    return json.dumps(text, ensure_ascii=False)
