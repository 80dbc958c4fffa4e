"""``ckd-fed doctor``: what would keep a node or a cluster from working, found before anything starts; a line for each check."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from ckd_fed.config import resolve
from ckd_fed.deploy.certificates import days_left, read_certificate
from ckd_fed.deploy.plan import read_node_toml
from ckd_fed.errors import CkdError
from ckd_fed.home import code_version, home

_SOON = 30  # days before a certificate expires from which on that is said
_TIMEOUT = 5.0  # seconds for a connection
_DISK = 2**30  # bytes that a workspace may need


class Trouble(Exception):
    """A check that failed: what is wrong, and what helps."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.remedy = remedy


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    ok: bool
    found: str
    remedy: str = ""

    def line(self) -> str:
        """One line: ``ok`` or ``FAILED``, what was looked at, what was found, what helps."""
        text = " ".join(f"{self.found}{f' -> {self.remedy}' if self.remedy else ''}".split())
        return f"{'ok    ' if self.ok else 'FAILED'}  {self.name:<14} {text}"


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except Trouble as trouble:
        return Check(name, False, str(trouble), trouble.remedy)
    except CkdError as error:
        return Check(name, False, str(error))
    except OSError as error:  # above all a key that belongs to the user who runs the node
        return Check(name, False, str(error), "run the doctor as the user who runs the node")


# --- a node ---------------------------------------------------------------------------------------------------------------------------


def node_checks(path: Path, dataset: str) -> Iterator[Check]:
    """All checks of the node that a node file describes.

    Args:
        path: ``node.toml`` or the folder that holds it.
        dataset: name of the dataset, for its modalities and its default place.
    """
    node = read_node_toml(path)
    folder = Path(str(node["folder"]))
    yield _check("python", _python)
    yield _check("packages", _packages)
    yield _check("role", lambda: _role(node))
    yield _check("device", lambda: _device(str(node.get("device", "auto"))))
    yield _check("kernels", lambda: _kernels(node))
    yield _check("workspace", lambda: _workspace(node))
    yield _check("data", lambda: _data(node, dataset))
    secure = bool(node.get("secure", True))
    if secure:
        yield _check("certificate", lambda: _authority(folder / "ca.crt"))
        yield _check("key", lambda: _key(folder / "key"))
    yield _check("superlink", lambda: _reachable(str(node.get("superlink", "")), folder / "ca.crt" if secure else None))


def _python() -> str:
    version = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036  # a doctor looks at what is there
        raise Trouble(f"Python {version}", "Python 3.11 or newer is needed")
    return f"Python {version}"


def _packages() -> str:
    from packaging.requirements import Requirement

    wrong = []
    try:
        requirements = [Requirement(text) for text in metadata.requires("ckd_fed") or []]
    except metadata.PackageNotFoundError:
        raise Trouble("ckd_fed is not installed as a package", "pip install it into this environment") from None
    found = {}
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found[requirement.name] = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found[requirement.name], prereleases=True):
            wrong.append(f"{requirement.name} is {found[requirement.name]}, {requirement.specifier} is needed")
    if wrong:
        raise Trouble("; ".join(wrong), "install ckd_fed again: pip install -c constraints.txt .")
    return (
        f"ckd_fed {code_version()}, flwr {found['flwr']}, torch {found['torch']}, numpy {found['numpy']} (ckd_fed must be the same on all machines)"
    )


def _role(node: Mapping[str, object]) -> str:
    role, modality = node.get("role"), node.get("modality", "")
    if role not in ("teacher", "student"):
        raise Trouble(f"role is {role!r}", 'write role = "teacher" or role = "student" into node.toml and supernode.sh')
    if role == "teacher" and not modality:
        raise Trouble("a teacher without modality", 'write for example modality = "text" into node.toml and supernode.sh')
    return f"{role} {modality}".strip()


def _device(name: str) -> str:
    import torch

    from ckd_fed.training.build import choose_device

    try:
        device = choose_device(name)
    except (CkdError, RuntimeError) as error:
        raise Trouble(str(error), "set device in node.toml and supernode.sh to one that is there, or to auto") from None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{device}, {torch.cuda.get_device_name(device)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return f"{device}, {os.cpu_count()} CPUs" + (" (this machine shows no GPU)" if name == "auto" else "")


def _kernels(node: Mapping[str, object]) -> str:
    from ckd_fed.kernels import built, keep_in

    keep_in(home(resolve({}), node) / "cache" / "kernels")
    library, found = built()
    return found if library else f"none, {found} (training on a CPU then takes longer; a GPU needs none)"


def _workspace(node: Mapping[str, object]) -> str:
    place = home(resolve({}), node) / "workspace"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
    except OSError as error:
        raise Trouble(f"{place} cannot be written: {error.strerror}", "make it writable for the user who runs the node, or set home") from None
    free = shutil.disk_usage(place).free
    if free < _DISK:
        raise Trouble(f"{place} has {free / 2**20:.0f} MiB free", "make room; a node keeps parameters and optimiser state there")
    return f"{place}, {free / 2**30:.0f} GiB free"


def _data(node: Mapping[str, object], dataset: str) -> str:
    from ckd_fed.data.locate import open_dataset

    config = resolve({"dataset": dataset})
    modality = str(node.get("modality", ""))
    teacher = node.get("role") == "teacher"
    found = open_dataset(config, node, modalities=(modality,) if teacher else None, at_least=1 if teacher else 2)
    standin = " STAND-IN, not the real data;" if found.standin else ""
    return f"{found.directory}:{standin} {found.describe()}; split {found.fingerprint[:12]} (must be the same on all machines)"


def _authority(path: Path) -> str:
    if not path.is_file():
        raise Trouble(f"{path} is missing", "copy the node's whole folder from the cluster's folder")
    left = days_left(read_certificate(path))
    if left < 0:
        raise Trouble(f"{path} expired {-left:.0f} days ago", "make the cluster anew with `ckd-fed cluster init`")
    return f"{path.name} valid for {left:.0f} days" + (" (renew it soon)" if left < _SOON else "")


def _key(path: Path) -> str:
    if not path.is_file():
        raise Trouble(f"{path} is missing", "copy the node's whole folder from the cluster's folder")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise Trouble(f"{path} is readable by others (mode {stat.S_IMODE(path.stat().st_mode):o})", f"chmod 600 {path}")
    try:
        key = load_ssh_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise Trouble(f"{path} is no private key: {error}", "copy it again from the cluster's folder") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Trouble(f"{path} is a {type(key).__name__}", "Flower takes elliptic-curve keys: ssh-keygen -t ecdsa -b 384")
    return f"{key.curve.name}, readable by its owner only; registered is it only if `flwr supernode list` shows it"


def _reachable(address: str, authority: Path | None) -> str:
    """TCP and TLS, told apart (Flower gives one message for both)."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal():
        raise Trouble(f"superlink is {address!r}", 'host and port are needed, for example superlink = "gpu1:8000"')
    try:
        with socket.create_connection((host, int(port)), timeout=_TIMEOUT) as plain:
            if authority is None:
                return f"{address} answers (without TLS)"
            if not authority.is_file():
                raise Trouble(f"{address} answers, but {authority} to check its certificate by is missing", "copy the node's whole folder")
            context = ssl.create_default_context(cafile=str(authority))
            with context.wrap_socket(plain, server_hostname=host) as wrapped:
                certificate: Any = wrapped.getpeercert()
    except socket.gaierror:
        raise Trouble(f"the host name {host} is unknown here", "enter it into DNS or /etc/hosts, or use an IP address") from None
    except ssl.SSLCertVerificationError as error:
        remedy = f"`ckd-fed cluster move DIR --host {host}` makes a certificate for that name; copy superlink/ and ca.crt again"
        raise Trouble(f"{address} answers with a certificate that does not fit: {error.verify_message}", remedy) from None
    except ssl.SSLError as error:
        raise Trouble(
            f"{address} answers, but not with TLS: {error.reason}", "start the SuperLink with superlink.sh, or the node with --insecure"
        ) from None
    except OSError as error:
        why = "does not answer" if isinstance(error, TimeoutError) else f"cannot be reached: {error.strerror or error}"
        raise Trouble(f"{address} {why}", "start the SuperLink; open its port in the firewall") from None
    left = (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400
    return f"{address} answers with TLS, its certificate is valid for {left:.0f} days" + (" (renew it soon)" if left < _SOON else "")


# --- a connection ---------------------------------------------------------------------------------------------------------------------


def connection_checks(name: str, cluster: Path | None) -> Iterator[Check]:
    """All checks of a connection in Flower's configuration.

    Args:
        name: of the connection.
        cluster: folder of the cluster (or its ``operator`` folder): names the nodes that should be there. Flower itself tells no names,
            and roles only to a run.
    """
    entry: dict[str, Any] = {}

    def connection() -> str:
        entry.update(_connection(name))
        return f"{name} is {entry.get('address')}"

    first = _check("connection", connection)
    yield first
    if not first.ok:
        return
    certificate = entry.get("root-certificates")
    reached = _check("superlink", lambda: _reachable(str(entry.get("address", "")), Path(certificate) if certificate else None))
    yield reached
    if not reached.ok:
        return
    status: dict[str, str] = {}

    def listed() -> str:
        status.update({str(node.get("node-id")): str(node.get("status")) for node in _nodes(name)})
        if not status:
            raise Trouble("no node is registered or connected", "register the nodes' keys (operator/register.sh) and start the nodes")
        online = sum(state == "online" for state in status.values())
        return f"{len(status)} known, {online} online"

    known = _check("nodes", listed)
    yield known
    if not known.ok:
        return
    expected: dict[str, str] = {}

    def registered() -> str:
        expected.update(_registered(cluster) if cluster else {})
        return f"{len(expected)} nodes belong to it"

    if cluster:
        yield _check("cluster", registered)
    names = {node_id: node for node, node_id in expected.items() if node_id}
    for node, node_id in expected.items():
        yield _check("node", lambda node=node, node_id=node_id: _online(node, node_id, status))  # type: ignore[misc]
    for node_id in sorted(set(status) - set(names)):
        yield _check("node", lambda node_id=node_id: _online("not of this cluster" if cluster else "a node", node_id, status))  # type: ignore[misc]


def _registered(cluster: Path) -> dict[str, str]:
    """Name -> id given at registration, of a cluster's nodes; an empty id where it has not been registered."""
    operator = cluster / "operator" if (cluster / "operator").is_dir() else cluster
    names = sorted(path.stem for path in (operator / "keys").glob("*.pub"))
    if not names:
        raise Trouble(f"{cluster} holds no keys of nodes", "name the folder that `ckd-fed cluster init` wrote, or its operator folder")
    found = {}
    for name in names:
        try:
            found[name] = str(json.loads((operator / "registered" / f"{name}.json").read_text())["node-id"])
        except (OSError, ValueError, KeyError, TypeError):
            found[name] = ""
    return found


def _connection(name: str) -> dict[str, Any]:
    path = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser() / "config.toml"
    try:
        superlinks = tomllib.loads(path.read_text()).get("superlink", {})
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise Trouble(f"{path} cannot be read: {error}", "append to it what the cluster's operator/connection.sh prints") from None
    if not isinstance(superlinks.get(name), dict):
        there = ", ".join(key for key, value in superlinks.items() if isinstance(value, dict)) or "none"
        raise Trouble(f"{path} has no connection {name!r} (there are: {there})", "append to it what the cluster's operator/connection.sh prints")
    return dict(superlinks[name])


def _nodes(name: str) -> list[dict[str, Any]]:
    command = [str(Path(sys.executable).parent / "flwr"), "supernode", "list", name, "--format", "json"]
    environment = {**os.environ, "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        found = json.loads(done.stdout[done.stdout.index("{") :])
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise Trouble(f"`flwr supernode list {name}` failed: {error}", "run it by hand") from None
    if not found.get("success", True):
        raise Trouble(f"`flwr supernode list {name}` failed: {found.get('error-message')}", "run it by hand")
    return list(found.get("nodes", []))


def _online(name: str, node_id: str, status: Mapping[str, str]) -> str:
    if not node_id:
        raise Trouble(f"{name}: not registered", "run operator/register.sh, then start the node")
    what = f"{name} (id {node_id}): {status.get(node_id, 'unknown to the SuperLink')}"
    if node_id not in status:
        raise Trouble(what, "its SuperLink lost its database: delete operator/registered and run operator/register.sh again")
    if status[node_id] != "online":
        raise Trouble(what, "start it with its supernode.sh; after a kill its key is refused for about a minute")
    return what
