"""The arguments of ``ckd-fed cluster`` and ``ckd-fed doctor``."""

from __future__ import annotations

import argparse
from typing import Any

from ckd_fed.errors import CkdError, ConfigError

# Heavy imports (cryptography, torch) happen in the commands that need them, so that --help stays quick.


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the sub-commands to ``ckd-fed``."""
    cluster = commands.add_parser("cluster", help="certificates, keys, commands and scripts for nodes on several machines")
    what = cluster.add_subparsers(required=True, metavar="init|move")
    init = what.add_parser("init", help="write a cluster's folder and print what to run on which machine")
    init.add_argument("directory", metavar="DIR")
    _hosts(init, "where the folders lie on the machines, for systemd (default /opt/ckd_fed)", "/opt/ckd_fed")
    init.add_argument("--teachers", required=True, metavar="M,M", help="modalities; one named twice gets a hot spare")
    init.add_argument("--students", type=int, default=1, metavar="N", help="student nodes (default 1)")
    init.add_argument("--data-dir", default="", metavar="PATH", help="of the nodes, on their machines; {name} in it stands for the node's name")
    init.add_argument("--home", default="", metavar="PATH", help="of the nodes' workspaces, likewise; by default $CKD_FED_HOME or ~/.ckd_fed")
    init.add_argument(
        "--device", action="append", default=[], metavar="NODE=DEV", help="for example student-0=cuda:1; by default auto; may be repeated"
    )
    init.add_argument("--name", default="lab", help="of the connection (default lab)")
    init.add_argument("--port", type=int, default=8000, help="of the SuperLink (default 8000)")
    init.add_argument("--bind", default="0.0.0.0", metavar="ADDRESS", help="address that the SuperLink listens on (default 0.0.0.0)")
    init.add_argument("--insecure", action="store_true", help="no TLS and no keys: for tests on one machine only")
    init.set_defaults(action=_init)
    move = what.add_parser("move", help="give the SuperLink of a cluster another host; authority and node keys stay")
    move.add_argument("directory", metavar="DIR")
    _hosts(move, "where the folders lie on the machines, for systemd, if elsewhere than before", "")
    move.set_defaults(action=_move)

    doctor = commands.add_parser("doctor", help="check a node before it starts, or a connection; exits 0 only if all is well")
    doctor.add_argument("node", nargs="?", metavar="NODE", help="node.toml, or the folder that holds it")
    doctor.add_argument("--dataset", default="baby", help="of the runs to come (default baby)")
    doctor.add_argument("--connection", metavar="NAME", help="of a SuperLink in Flower's config.toml: which nodes are there, what is missing")
    doctor.add_argument("--cluster", metavar="DIR", help="with --connection: the cluster's folder, which says who should be there")
    doctor.set_defaults(action=_doctor)


def _hosts(parser: argparse.ArgumentParser, where: str, install: str) -> None:
    parser.add_argument(
        "--host", action="append", required=True, help="the SuperLink's host name or IP address; repeat it for further ones in the certificate"
    )
    parser.add_argument("--days", type=int, default=365, help="validity of the certificates (default 365); none outlives its authority")
    parser.add_argument("--install", default=install, metavar="PATH", help=where)


def _init(arguments: argparse.Namespace) -> None:
    from ckd_fed.deploy.cluster import init_cluster
    from ckd_fed.deploy.plan import ClusterPlan, plan_nodes
    from ckd_fed.files import expanded

    devices: dict[str, str] = {}
    for text in arguments.device:
        name, equals, device = text.partition("=")
        if not equals or not device:
            raise ConfigError(f"--device is {text!r}; NODE=DEVICE is needed, for example student-0=cuda:1")
        if name in devices:
            raise ConfigError(f"--device names {name!r} twice, with {devices[name]} and {device}; a node trains on one device")
        devices[name] = device
    _positive_days(arguments.days)
    nodes = plan_nodes(arguments.teachers, arguments.students, arguments.data_dir, devices, arguments.home)
    plan = ClusterPlan(arguments.name, tuple(arguments.host), arguments.port, nodes, not arguments.insecure, arguments.bind, arguments.install)
    init_cluster(expanded(arguments.directory, "DIR"), plan, print, days=arguments.days)


def _move(arguments: argparse.Namespace) -> None:
    from ckd_fed.deploy.cluster import move_cluster
    from ckd_fed.files import expanded

    _positive_days(arguments.days)
    move_cluster(expanded(arguments.directory, "DIR"), arguments.host, print, days=arguments.days, install=arguments.install)


def _positive_days(days: int) -> None:
    if not 0 < days <= 36500:
        raise ConfigError(f"--days is {days}; a number from 1 to 36500 is needed")


def _doctor(arguments: argparse.Namespace) -> None:
    from ckd_fed.deploy.doctor import connection_checks, node_checks
    from ckd_fed.files import expanded

    if (arguments.node is None) == (arguments.connection is None):
        raise ConfigError("doctor looks at a node (`ckd-fed doctor nodes/teacher-text`) or at a connection (`ckd-fed doctor --connection lab`)")
    if arguments.cluster and not arguments.connection:
        raise ConfigError("doctor: --cluster goes with --connection")
    if arguments.connection:
        checks = connection_checks(arguments.connection, expanded(arguments.cluster, "--cluster") if arguments.cluster else None)
    else:
        checks = node_checks(expanded(arguments.node, "NODE"), arguments.dataset)
    failed = 0
    for check in checks:
        print(check.line(), flush=True)
        failed += not check.ok
    if failed:
        raise CkdError(f"{failed} of the checks failed")
