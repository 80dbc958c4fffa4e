"""``ckd-fed cluster``: write a cluster's folder, with everything that each of its machines needs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ckd_fed.deploy.certificates import (
    Authority,
    create_authority,
    create_server_certificate,
    days_left,
    read_certificate,
    write_certificate,
    write_key,
    write_node_key,
)
from ckd_fed.deploy.plan import ClusterPlan, NodePlan, node_toml, shown
from ckd_fed.deploy.scripts import connection_script, register_script, slurm_script, superlink_script, supernode_script, systemd_unit
from ckd_fed.errors import ConfigError, DataError

_PLAN = "cluster.json"


def init_cluster(directory: Path, plan: ClusterPlan, write: Callable[[str], None], *, days: int = 365) -> None:
    """Write a cluster's folder and print what to run where.

    ::

        ca.crt, ca.key        the authority; the key stays here
        superlink/            for the SuperLink's machine: certificate, key, superlink.sh, systemd unit
        nodes/<name>/         for each node's machine: its key, ca.crt, node.toml, supernode.sh, systemd unit
        operator/             for whoever starts runs: connection.sh, ca.crt, the nodes' public keys, register.sh
        slurm.sh              all of it as one batch job

    Args:
        directory: to be made; must not hold a cluster already.
        plan: of the cluster.
        write: prints one line.
        days: how long the certificates are valid.

    Raises:
        ConfigError: there is a cluster already, or the folder cannot be written.
    """
    if (directory / _PLAN).exists():
        raise ConfigError(f"{directory} holds a cluster already; `ckd-fed cluster move` changes its host, another folder holds another cluster")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
        if plan.secure:
            authority = create_authority(plan.name, days)
            write_certificate(directory / "ca.crt", authority.certificate)
            write_key(directory / "ca.key", authority.key)
            for node in plan.nodes:
                folder = directory / "nodes" / node.name
                folder.mkdir(parents=True, exist_ok=True)
                write_node_key(folder / "key", node.name)
        _write(directory, plan, days)
    except OSError as error:
        raise ConfigError(f"the cluster's folder {directory} cannot be written: {error}") from None
    for line in guide(directory.resolve(), plan):
        write(line)


def move_cluster(directory: Path, hosts: Sequence[str], write: Callable[[str], None], *, days: int = 365, install: str = "") -> None:
    """Give a cluster's SuperLink another host: a new server certificate and new scripts; authority and node keys stay.

    Args:
        directory: of the cluster.
        hosts: names and addresses of the new host.
        write: prints one line.
        days: how long the new certificate is valid, though no longer than its authority.
        install: another place of the folders on the machines; empty for the one that the cluster was made for.

    Raises:
        DataError: there is no cluster, or its files are damaged, or its authority has expired.
    """
    plan = read_plan(directory)
    plan = dataclasses.replace(plan, hosts=tuple(hosts), install=install or plan.install)
    _write(directory, plan, days)
    write(f"{directory}: the SuperLink is now {plan.address}; copy superlink/, nodes/ and operator/ to their machines again")


def read_plan(directory: Path) -> ClusterPlan:
    """The plan in a cluster's folder.

    Raises:
        DataError: there is none.
        ConfigError: it holds a value that `ckd-fed cluster init` would refuse.
    """
    try:
        values: dict[str, Any] = json.loads((directory / _PLAN).read_text())
        nodes = tuple(NodePlan(**node) for node in values.pop("nodes"))
        return ClusterPlan(**{**values, "hosts": tuple(values["hosts"]), "nodes": nodes})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{directory} holds no cluster of `ckd-fed cluster init`: {error}") from None


def _write(directory: Path, plan: ClusterPlan, days: int) -> None:
    superlink, operator = directory / "superlink", directory / "operator"
    for folder in (superlink, operator / "keys"):
        folder.mkdir(parents=True, exist_ok=True)
    if plan.secure:
        certificate, key = create_server_certificate(_authority(directory), plan.certified_hosts, days)
        write_certificate(superlink / "server.crt", certificate)
        write_key(superlink / "server.key", key)
        for folder in (superlink, operator):
            shutil.copyfile(directory / "ca.crt", folder / "ca.crt")
        _executable(operator / "register.sh", register_script(plan))
    _executable(superlink / "superlink.sh", superlink_script(plan))
    unit = systemd_unit("ckd_fed SuperLink", f"{plan.install}/superlink", "superlink.sh")
    (superlink / "ckd-superlink.service").write_text(unit)
    _executable(operator / "connection.sh", connection_script(plan))
    for node in plan.nodes:
        folder = directory / "nodes" / node.name
        folder.mkdir(parents=True, exist_ok=True)
        if plan.secure:
            shutil.copyfile(directory / "ca.crt", folder / "ca.crt")
            shutil.copyfile(folder / "key.pub", operator / "keys" / f"{node.name}.pub")
        (folder / "node.toml").write_text(node_toml(plan, node))
        _executable(folder / "supernode.sh", supernode_script(plan, node))
        unit = systemd_unit(f"ckd_fed node {node.name}", f"{plan.install}/{node.name}", "supernode.sh")
        (folder / f"ckd-{node.name}.service").write_text(unit)
    _executable(directory / "slurm.sh", slurm_script(plan, str(directory.resolve())))
    (directory / _PLAN).write_text(json.dumps(dataclasses.asdict(plan), indent=1) + "\n")


def _authority(directory: Path) -> Authority:
    try:
        key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"the authority's key {directory / 'ca.key'} cannot be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DataError(f"the authority's key {directory / 'ca.key'} is none of `ckd-fed cluster init`")
    certificate = read_certificate(directory / "ca.crt")
    if days_left(certificate) <= 0:
        raise DataError(f"the authority {directory / 'ca.crt'} has expired; make a new cluster by `ckd-fed cluster init` in another folder")
    return Authority(certificate, key)


def _executable(path: Path, content: str) -> None:
    path.write_text(content)
    path.chmod(0o755)


def guide(directory: Path, plan: ClusterPlan) -> list[str]:
    """What to run where, in order."""
    lines = [f"cluster {plan.name} in {directory}"]
    if not plan.secure:
        lines.append("!! INSECURE: no TLS, no keys; anybody who reaches the port can read, change and join")
    lines += ["", f"1. on {plan.hosts[0]}, in superlink/ (superlink.sh, ckd-superlink.service):", f"   {shown(plan.superlink_command())}"]
    lines += ["", "2. where runs are started from, in operator/: make the connection known"]
    lines += ["   bash connection.sh >> ~/.flwr/config.toml     # it says, here:"]
    lines += [f"     {line}" for line in plan.connection(str(directory / "operator" / "ca.crt")).splitlines()]
    if plan.secure:
        lines += ["   and register the nodes' keys before they start (register.sh):"]
        lines += [f"   {shown(plan.register_command(node))}" for node in plan.nodes]
    lines += ["", "3. on each node's machine, in nodes/<name>/ copied there (supernode.sh, ckd-<name>.service); first `ckd-fed doctor .`"]
    lines += [f"   {node.name}: {shown(plan.supernode_command(node))}" for node in plan.nodes]
    workers = f" -c 'federation.student-workers={plan.students}'" if plan.students > 1 else ""
    lines += [
        "",
        "4. where runs are started from:",
        f"   {shown(['ckd-fed', 'doctor', '--connection', plan.name, '--cluster', str(directory)])}",
        f"   flwr run simulations/baby {plan.name} --stream{workers}",
    ]
    return lines
