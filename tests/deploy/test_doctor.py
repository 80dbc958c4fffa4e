"""The doctor finds each thing that would keep a node from working, and says what helps."""

import contextlib
import socket
import ssl
import threading
from pathlib import Path

import pytest

from ckd_fed.cli import main
from ckd_fed.deploy.doctor import connection_checks, node_checks


@pytest.fixture
def serve():
    """Listen on a port of loopback; every connection goes through the TLS context (None: plain TCP that says nothing of TLS)."""
    stop = []

    def start(context):
        listener = socket.create_server(("0.0.0.0", 0))

        def run():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with contextlib.suppress(OSError):
                        if context:
                            connection = context.wrap_socket(connection, server_side=True)
                            connection.recv(1)
                        else:
                            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                        connection.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        stop.append((listener, thread))
        return listener.getsockname()[1]

    yield start
    for listener, thread in stop:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


@pytest.fixture
def node(tmp_path, write_dataset, serve, capsys):
    """A node of a cluster whose SuperLink answers; returns its folder."""

    def build(name="teacher-text", hosts=("127.0.0.1",)):
        data = write_dataset("data")
        hosts = [word for host in hosts for word in ("--host", host)]
        folder = tmp_path / "lab"
        main(["cluster", "init", str(folder), *hosts, "--teachers", "image,text", "--data-dir", str(data), "--home", str(tmp_path / "home")])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "superlink/server.crt", folder / "superlink/server.key")
        point(folder / "nodes" / name, f"127.0.0.1:{serve(context)}")
        capsys.readouterr()
        return folder / "nodes" / name

    return build


def point(folder, address):
    change(folder, "superlink", address)


def change(folder, key, value):
    lines = [line for line in (folder / "node.toml").read_text().splitlines() if not line.startswith(f"{key} ")]
    (folder / "node.toml").write_text("\n".join([*lines, f'{key} = "{value}"']) + "\n")


def failed(checks):
    """Name -> line of the checks that failed; every line is one line."""
    checks = list(checks)
    assert all("\n" not in check.line() for check in checks)
    return {check.name: check.line() for check in checks if not check.ok}


def test_a_good_node_passes_every_check(node):
    checks = list(node_checks(node(), "toy"))
    assert failed(checks) == {}
    assert [check.name for check in checks] == [
        "python",
        "packages",
        "role",
        "device",
        "kernels",
        "workspace",
        "data",
        "certificate",
        "key",
        "superlink",
    ]
    lines = {check.name: check.line() for check in checks}
    assert "text 5-d" in lines["data"]
    assert "image" not in lines["data"]  # a teacher opens its own modality and no other
    assert "answers with TLS" in lines["superlink"]


def test_the_exit_code_says_whether_all_is_well(node, capsys):
    folder = node("student-0")
    main(["doctor", str(folder), "--dataset", "toy"])
    assert "FAILED" not in capsys.readouterr().out
    (folder / "key").chmod(0o644)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", str(folder), "--dataset", "toy"])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert said.out.count("FAILED") == 1
    assert "1 of the checks failed" in said.err


@pytest.mark.parametrize(
    ("spoil", "name", "mentions"),
    [
        (lambda folder: change(folder, "device", "cuda:9"), "device", ["cuda:9", "set device"]),
        (lambda folder: change(folder, "device", "tpu"), "device", ["set device"]),
        (lambda folder: change(folder, "role", "pupil"), "role", ["'pupil'", 'role = "teacher"']),
        (lambda folder: change(folder, "data-dir", "/nowhere/at/all"), "data", ["/nowhere/at/all", "does not exist"]),
        (lambda folder: change(folder, "modality", "smell"), "data", ["unknown modality 'smell'", "image, text"]),
        (lambda folder: change(folder, "home", "/proc/nothing"), "workspace", ["/proc/nothing", "cannot be written"]),
        (lambda folder: (folder / "ca.crt").write_text("no certificate"), "certificate", ["cannot be read"]),
        (lambda folder: (folder / "ca.crt").unlink(), "certificate", ["is missing", "copy the node's whole folder"]),
        (lambda folder: (folder / "key").unlink(), "key", ["is missing"]),
        (lambda folder: (folder / "key").write_text("no key"), "key", ["no private key"]),
        (lambda folder: (folder / "key").chmod(0o640), "key", ["readable by others (mode 640)", "chmod 600"]),
        (lambda folder: point(folder, "127.0.0.1:1"), "superlink", ["cannot be reached: Connection refused", "start the SuperLink"]),
        (lambda folder: point(folder, "no.such.host.invalid:8000"), "superlink", ["host name no.such.host.invalid is unknown"]),
        (lambda folder: point(folder, "gpu1"), "superlink", ["host and port are needed"]),
    ],
)
def test_each_fault_is_found_with_its_remedy(spoil, name, mentions, node):
    folder = node()
    spoil(folder)
    found = failed(node_checks(folder, "toy"))
    assert name in found
    for mention in mentions:
        assert mention in found[name]
    assert set(found) <= {name, "superlink"}  # without its authority a node cannot check the SuperLink either


def test_a_certificate_for_another_name_and_a_server_without_tls(node, serve):
    folder = node(hosts=("gpu1.example",))
    address = (folder / "node.toml").read_text().partition("127.0.0.1")[2].partition('"')[0]
    point(folder, f"127.0.0.2{address}")
    line = failed(node_checks(folder, "toy"))["superlink"]
    assert "does not fit" in line
    assert "cluster move DIR --host 127.0.0.2" in line
    point(folder, f"127.0.0.1:{serve(None)}")
    assert "but not with TLS" in failed(node_checks(folder, "toy"))["superlink"]


def test_an_expired_authority(node, tmp_path):
    from ckd_fed.deploy.certificates import create_authority, write_certificate

    folder = node()
    write_certificate(folder / "ca.crt", create_authority("old", 0).certificate)
    assert "expired" in failed(node_checks(folder, "toy"))["certificate"]


def test_a_key_of_another_user_keeps_no_check_from_being_made(node, monkeypatch):
    read = Path.read_bytes

    def as_somebody_else(path):
        if path.name == "key":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    folder = node()
    monkeypatch.setattr(Path, "read_bytes", as_somebody_else)
    checks = list(node_checks(folder, "toy"))
    assert [check.name for check in checks][-2:] == ["key", "superlink"]
    assert "Permission denied" in failed(checks)["key"]
    assert "as the user who runs the node" in failed(checks)["key"]


def test_a_connection_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert "cannot be read" in failed(connection_checks("lab", None))["connection"]
    (tmp_path / "config.toml").write_text('[superlink.other]\naddress = "127.0.0.1:1"\n')
    line = failed(connection_checks("lab", None))["connection"]
    assert "no connection 'lab' (there are: other)" in line
    assert "connection.sh" in line
    assert "Connection refused" in failed(connection_checks("other", None))["superlink"]


def test_the_nodes_of_a_cluster_by_name(tmp_path, monkeypatch, serve):
    import json

    from ckd_fed.deploy import doctor

    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    main(["cluster", "init", str(tmp_path / "lab"), "--host", "127.0.0.1", "--teachers", "image,text"])
    (tmp_path / "config.toml").write_text(f'[superlink.lab]\naddress = "127.0.0.1:{serve(None)}"\ninsecure = true\n')
    there = [{"node-id": "1", "status": "online"}, {"node-id": "2", "status": "offline"}, {"node-id": "4", "status": "online"}]
    monkeypatch.setattr(doctor, "_nodes", lambda name: there)
    (tmp_path / "lab/operator/registered").mkdir()
    for name, node_id in {"teacher-image": 1, "teacher-text": 2, "student-0": 3}.items():
        (tmp_path / f"lab/operator/registered/{name}.json").write_text(json.dumps({"node-id": node_id}))
    lines = [check.line() for check in connection_checks("lab", tmp_path / "lab")]
    assert "3 known, 2 online" in lines[2]
    nodes = [line for line in lines if " node " in line]
    assert len(nodes) == 4
    assert [line for line in nodes if line.startswith("ok") and "teacher-image (id 1): online" in line]
    assert [line for line in nodes if line.startswith("FAILED") and "teacher-text (id 2): offline" in line and "supernode.sh" in line]
    assert [line for line in nodes if line.startswith("FAILED") and "student-0 (id 3): unknown to the SuperLink" in line]
    assert [line for line in nodes if line.startswith("ok") and "not of this cluster (id 4)" in line]
    (tmp_path / "lab/operator/registered/student-0.json").unlink()
    assert [line for line in [c.line() for c in connection_checks("lab", tmp_path / "lab/operator")] if "student-0: not registered" in line]
