"""What `ckd-fed cluster` writes is what its machines need: certificates that verify, keys that Flower takes, scripts that a shell takes."""

import json
import os
import shlex
import shutil
import socket
import ssl
import stat
import subprocess
import tomllib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.cli.constant import DEFAULT_FLOWER_CONFIG_TOML
from flwr.common.config import parse_config_args

from ckd_fed.cli import build_parser, main, parse_overrides
from ckd_fed.config import resolve
from ckd_fed.deploy.certificates import create_authority, days_left, read_certificate, write_certificate, write_key
from ckd_fed.deploy.cluster import read_plan
from ckd_fed.deploy.scripts import connection_script
from ckd_fed.errors import ConfigError, DataError

HOSTILE = "a b;$(touch PWN)`touch PWN`$HOME%n&#=é"  # what a path may hold, and no shell, systemd, TOML or Flower may take for more than text


@pytest.fixture
def cluster(tmp_path, capsys):
    """Run `ckd-fed cluster init`; returns (folder, what was printed)."""

    def init(*options, name="lab"):
        folder = tmp_path / name
        main(["cluster", "init", str(folder), "--host", "gpu1.example", "--host", "10.0.0.7", "--teachers", "image,text", *options])
        return folder, capsys.readouterr().out

    return init


def test_the_server_certificate_holds_for_every_host_and_is_signed_by_the_authority(cluster):
    folder, _ = cluster("--students", "2", "--days", "90")
    certificate, authority = read_certificate(folder / "superlink/server.crt"), read_certificate(folder / "ca.crt")
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gpu1.example", "localhost"]
    # Flower's own processes beside the SuperLink reach it by loopback, with TLS
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "127.0.0.1"]
    assert 89 < days_left(certificate) <= 90
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "superlink/server.crt", folder / "superlink/server.key")  # they belong together


def test_every_node_has_a_key_of_its_own_and_nobody_else_can_read_it(cluster):
    folder, _ = cluster("--students", "2")
    public = set()
    for node in ("teacher-image", "teacher-text", "student-0", "student-1"):
        path = folder / "nodes" / node / "key"
        key = load_ssh_private_key(path.read_bytes(), password=None)
        assert isinstance(key.curve, ec.SECP384R1)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        registered = load_ssh_public_key((folder / "operator/keys" / f"{node}.pub").read_bytes())
        assert registered == key.public_key()
        public.add((folder / "operator/keys" / f"{node}.pub").read_text())
        assert (folder / "nodes" / node / "ca.crt").read_bytes() == (folder / "ca.crt").read_bytes()
    assert len(public) == 4
    assert stat.S_IMODE((folder / "ca.key").stat().st_mode) == 0o600
    assert not list((folder / "nodes").rglob("ca.key")) + list((folder / "operator").rglob("*.key"))


def test_scripts_and_what_is_printed_are_the_same_commands(cluster, tmp_path):
    folder, printed = cluster("--data-dir", "/data/{name}", "--device", "student-0=cuda:1", "--port", "9000")
    for script in folder.rglob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
    plan = read_plan(folder)
    for node in plan.nodes:
        command = (folder / "nodes" / node.name / "supernode.sh").read_text().splitlines()[-1].removeprefix("exec ")
        assert command in printed
        words = shlex.split(command)
        assert words[: words.index("--superlink")] == ["flower-supernode", "--root-certificates", "ca.crt", "--auth-supernode-private-key", "key"]
        assert words[words.index("--superlink") + 1] == "gpu1.example:9000"
        told = dict(pair.split("=", 1) for pair in words[words.index("--node-config") + 1].split(" "))
        assert told["data-dir"] == f'"/data/{node.name}"'
        assert told["device"] == ('"cuda:1"' if node.name == "student-0" else '"auto"')
        said = tomllib.loads((folder / "nodes" / node.name / "node.toml").read_text())
        assert {key: said[key] for key in ("role", "data-dir", "device", "superlink")} == {
            "role": node.role, "data-dir": f"/data/{node.name}", "device": node.device, "superlink": "gpu1.example:9000",
        }  # fmt: skip
        assert (
            f"ExecStart=/usr/bin/env bash /opt/ckd_fed/{node.name}/supernode.sh" in next((folder / "nodes" / node.name).glob("*.service")).read_text()
        )
    superlink = (folder / "superlink/superlink.sh").read_text().splitlines()[-1].removeprefix("exec ")
    assert superlink in printed
    assert "--enable-supernode-auth" in superlink
    assert "--insecure" not in printed
    elsewhere = shutil.copytree(folder / "operator", tmp_path / "copied/with blank/operator")
    for place in (folder / "operator", elsewhere):
        said = subprocess.run(["bash", str(place / "connection.sh")], cwd="/", check=True, capture_output=True, text=True).stdout
        connection = tomllib.loads(said)["superlink"]["lab"]
        assert connection == {"address": "gpu1.example:9000", "root-certificates": str(place / "ca.crt")}
    assert len({node.port for node in plan.nodes}) == len(plan.nodes)


def test_insecure_is_said_and_makes_no_keys(cluster):
    folder, printed = cluster("--insecure")
    assert "!! INSECURE" in printed
    assert not list(folder.rglob("*.key")) + list(folder.rglob("*.crt")) + list(folder.rglob("key"))
    assert "--insecure" in (folder / "superlink/superlink.sh").read_text()
    assert "insecure = true" in (folder / "operator/connection.sh").read_text()
    assert not (folder / "operator/register.sh").exists()


def test_a_modality_named_twice_gets_a_hot_spare(cluster, tmp_path):
    main(["cluster", "init", str(tmp_path / "other"), "--host", "h", "--teachers", "image,text,text"])
    assert [node.name for node in read_plan(tmp_path / "other").nodes] == ["teacher-image", "teacher-text", "teacher-text-spare1", "student-0"]


def test_moving_changes_the_host_and_keeps_authority_and_keys(cluster, capsys):
    folder, _ = cluster()
    before = {path: path.read_bytes() for path in [folder / "ca.key", folder / "ca.crt", *folder.glob("nodes/*/key")]}
    main(["cluster", "move", str(folder), "--host", "gpu2.example"])
    assert "gpu2.example:8000" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    certificate = read_certificate(folder / "superlink/server.crt")
    certificate.verify_directly_issued_by(read_certificate(folder / "ca.crt"))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gpu2.example", "localhost"]
    assert all("gpu2.example:8000" in path.read_text() for path in folder.glob("nodes/*/supernode.sh"))


def test_moving_keeps_the_place_of_the_folders_unless_another_is_given(cluster):
    folder, _ = cluster("--install", "/srv/ckd")
    for options, place in (([], "/srv/ckd"), (["--install", "/opt/other"], "/opt/other"), ([], "/opt/other")):
        main(["cluster", "move", str(folder), "--host", "gpu2.example", *options])
        units = {path.stem: path.read_text() for path in folder.rglob("*.service")}
        assert f"ExecStart=/usr/bin/env bash {place}/superlink/superlink.sh" in units["ckd-superlink"]
        assert f"WorkingDirectory={place}/student-0\n" in units["ckd-student-0"]


def test_no_server_certificate_outlives_its_authority(cluster):
    folder, _ = cluster("--days", "100")
    authority = read_certificate(folder / "ca.crt")
    for options, days in (([], 100), (["--days", "200"], 100), (["--days", "7"], 7)):
        main(["cluster", "move", str(folder), "--host", "gpu2.example", *options])
        certificate = read_certificate(folder / "superlink/server.crt")
        assert days - 1 < days_left(certificate) <= days
        assert certificate.not_valid_after_utc <= authority.not_valid_after_utc


def test_an_authority_that_has_expired_signs_nothing(cluster, capsys):
    folder, _ = cluster()
    expired = create_authority("lab", days=-0.01)
    write_certificate(folder / "ca.crt", expired.certificate)
    write_key(folder / "ca.key", expired.key)
    before = (folder / "superlink/server.crt").read_bytes()
    with pytest.raises(SystemExit):
        main(["cluster", "move", str(folder), "--host", "gpu2.example"])
    assert "ca.crt has expired; make a new cluster" in capsys.readouterr().err
    assert (folder / "superlink/server.crt").read_bytes() == before


@pytest.fixture
def sbatch(tmp_path):
    """Run slurm.sh with stand-ins for Slurm's, Flower's and our own commands; returns the arguments of ``ckd-fed run``."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, does in {
        "scontrol": "printf 'localhost\\n%.0s' 1 2 3 4",
        "srun": "exec sleep 30",
        "flwr": """echo '{"node-id": 1}'""",
        "ckd-fed": f"""[ "$1" = run ] && printf '%s\\n' "$@" > {tmp_path}/run; exit 0""",
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (tools / name).chmod(0o755)

    def submit(folder, *arguments):
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_JOB_ID": "7"}
        subprocess.run(["bash", str(folder / "slurm.sh"), *arguments], env=environment, check=True, timeout=30, capture_output=True)
        return (tmp_path / "run").read_text().splitlines()

    return submit


@pytest.mark.parametrize(
    ("given", "workers", "backbone"), [([], 2, "vbpr"), (["backbone=mmgcn"], 2, "mmgcn"), (["federation.student_workers=1"], 1, "vbpr")]
)
def test_a_slurm_job_makes_every_student_node_work(given, workers, backbone, cluster, sbatch):
    with socket.socket() as superlink:
        superlink.bind(("127.0.0.1", 0))
        superlink.listen()
        folder, _ = cluster("--students", "2", "--port", str(superlink.getsockname()[1]))
        run = build_parser().parse_args(sbatch(folder, "simulations/baby", *given))
    assert (run.app, run.connection) == ("simulations/baby", "lab")
    config = resolve(parse_overrides(run.config))
    assert (config.federation.student_workers, config.backbone) == (workers, backbone)


@pytest.fixture
def nothing_runs(tmp_path, monkeypatch):
    """The working directory, in which HOSTILE would leave a file if anything ran it."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.rglob("PWN"))


def test_a_path_reaches_the_node_as_it_was_given(cluster, nothing_runs):
    data, home = f"/data/{HOSTILE}/{{name}}", f"/home/{HOSTILE}/{{name}}"
    folder, printed = cluster("--data-dir", data, "--home", home)
    tool = nothing_runs / "flower-supernode"
    tool.write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"${@: -1}\"\n")
    tool.chmod(0o755)
    for node in read_plan(folder).nodes:
        place = folder / "nodes" / node.name
        environment = {**os.environ, "PATH": f"{nothing_runs}:{os.environ['PATH']}"}
        command = ["bash", str(place / "supernode.sh")]
        told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.removesuffix("\n")
        for said in (parse_config_args([told]), tomllib.loads((place / "node.toml").read_text())):
            assert said["data-dir"] == f"/data/{HOSTILE}/{node.name}"
            assert said["home"] == f"/home/{HOSTILE}/{node.name}"
            assert (said["role"], said["device"]) == (node.role, "auto")
        assert shlex.quote(told) in printed


def test_systemd_runs_the_script_of_a_folder_with_any_name(cluster, nothing_runs):
    folder, _ = cluster("--install", f"/opt/{HOSTILE}")
    place = f"/opt/{HOSTILE}".replace("%", "%%")
    units = {path.stem: path for path in folder.rglob("*.service")}
    for name, script in {"superlink": "superlink/superlink.sh", "student-0": "student-0/supernode.sh"}.items():
        lines = units[f"ckd-{name}"].read_text().splitlines()
        assert f"WorkingDirectory={place}/{name}" in lines  # taken whole, without quotes and variables
        assert f'ExecStart=/usr/bin/env bash "{place.replace("$", "$$")}/{script}"' in lines
    if shutil.which("systemd-analyze"):
        verified = subprocess.run(["systemd-analyze", "verify", "--man=no", *units.values()], capture_output=True, text=True, check=False)
        assert not [line for line in verified.stderr.splitlines() if "WorkingDirectory" in line or "ExecStart" in line]


def test_a_connection_holds_the_certificate_of_a_folder_with_any_name(cluster, nothing_runs):
    name = HOSTILE + "'\"\\"
    folder, printed = cluster(name=name)
    assert shlex.quote(str(folder)) in printed
    printed = subprocess.run(["bash", str(folder / "operator/connection.sh")], check=True, capture_output=True, text=True).stdout
    assert tomllib.loads(printed)["superlink"]["lab"] == {"address": "gpu1.example:8000", "root-certificates": f"{folder}/operator/ca.crt"}


def test_the_connection_script_expands_nothing_but_its_folder(cluster, nothing_runs):
    folder, _ = cluster()
    plan = read_plan(folder)
    object.__setattr__(plan, "hosts", (HOSTILE + "\\",))  # as if no check had refused it
    script = folder / "operator/connection.sh"
    script.write_text(connection_script(plan))
    subprocess.run(["bash", "-n", str(script)], check=True)
    printed = subprocess.run(["bash", str(script)], check=True, capture_output=True, text=True).stdout
    assert tomllib.loads(printed)["superlink"]["lab"]["address"] == f"{HOSTILE}\\:8000"


def test_a_slurm_job_runs_in_a_folder_with_any_name(cluster, sbatch, nothing_runs):
    with socket.socket() as superlink:
        superlink.bind(("127.0.0.1", 0))
        superlink.listen()
        folder, _ = cluster("--port", str(superlink.getsockname()[1]), name=HOSTILE + "'")
        subprocess.run(["bash", "-n", str(folder / "slurm.sh")], check=True)
        assert sbatch(folder, "simulations/baby")[:3] == ["run", "simulations/baby", "lab"]
    assert tomllib.loads((folder / "flwr-7/config.toml").read_text())["superlink"]["lab"]["root-certificates"] == f"{folder}/operator/ca.crt"


def test_a_connection_can_be_appended_to_what_flower_itself_writes(cluster, tmp_path, capsys):
    folder, _ = cluster()
    printed = subprocess.run(["bash", str(folder / "operator/connection.sh")], check=True, capture_output=True, text=True).stdout
    entries = tomllib.loads(DEFAULT_FLOWER_CONFIG_TOML + printed)["superlink"]
    for name in set(entries) - {"lab"}:
        with pytest.raises(SystemExit):
            main(["cluster", "init", str(tmp_path / "x"), "--host", "h", "--teachers", "image", "--name", name])
        assert f"--name is {name!r}; Flower's own config.toml" in capsys.readouterr().err


def test_moving_refuses_what_a_new_cluster_would(cluster, nothing_runs, capsys, refuses):
    folder, _ = cluster()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        main(["cluster", "move", str(folder), "--host", "fe80::1%$(touch PWN)"])
    assert "--host is 'fe80::1%$(touch PWN)'; a scope id" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    plan = json.loads((folder / "cluster.json").read_text())
    plan["nodes"][0]["device"] = "gpu"
    (folder / "cluster.json").write_text(json.dumps(plan))
    refuses(ConfigError, lambda: read_plan(folder), "unknown --device of teacher-image 'gpu'")
    plan["nodes"][0]["data_dir"] = 5
    (folder / "cluster.json").write_text(json.dumps(plan))
    refuses(DataError, lambda: read_plan(folder), "holds no cluster")


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        (["--host", "https://x", "--teachers", "image"], ["--host is 'https://x'", "without scheme"]),
        (["--host", "h", "--teachers", " , "], ["--teachers is empty"]),
        (["--host", "h", "--teachers", "im age"], ["'im age'"]),
        (["--host", "h", "--teachers", "image", "--students", "0"], ["--students is 0"]),
        (["--host", "h", "--teachers", "image", "--port", "0"], ["--port is 0"]),
        (["--host", "h", "--teachers", "image", "--days", "0"], ["--days is 0"]),
        (["--host", "h", "--teachers", "image", "--data-dir", "data"], ["--data-dir is 'data'", "absolute"]),
        (["--host", "h", "--teachers", "image", "--install", "srv"], ["--install is 'srv'", "absolute"]),
        (["--host", "h", "--teachers", "image", "--device", "cuda"], ["--device is 'cuda'", "NODE=DEVICE"]),
        (["--host", "h", "--teachers", "image", "--device", "x=cpu"], ["'x'", "teacher-image, student-0"]),
        (["--host", "h", "--teachers", "image", "--name", "a b"], ["--name is 'a b'"]),
        (["--host", "fe80::1%eth0", "--teachers", "image"], ["--host is 'fe80::1%eth0'", "scope id"]),
        (["--host", "h", "--teachers", "image", "--bind", "fe80::1%eth0"], ["--bind is 'fe80::1%eth0'", "scope id"]),
        (["--host", "h", "--teachers", "image", "--bind", "0.0.0.0:8000"], ["--bind is '0.0.0.0:8000'", "port"]),
        (["--host", "h", "--teachers", "image", "--bind=--help"], ["--bind is '--help'"]),
        (["--host", "h", "--teachers", "image", "--data-dir", r"/data/a\x b/{name}"], ["--data-dir is", r"a\\x b", "backslashes"]),
        (["--host", "h", "--teachers", "image", "--data-dir", '/data/"x'], ["--data-dir is", "without quotes"]),
        (["--host", "h", "--teachers", "image", "--home", "/home/a\nb"], [r"--home is '/home/a\nb", "unprintable"]),
        (["--host", "h", "--teachers", "image", "--install", "/opt/a\x1bb"], [r"--install is '/opt/a\x1bb'", "unprintable"]),
        (["--host", "h", "--teachers", "image", "--install", "/opt/../srv"], ["--install is '/opt/../srv'", "without '..'"]),
        (["--host", "h", "--teachers", "image", "--device", "student-0=gpu"], ["unknown --device of student-0 'gpu'", "cuda:N"]),
        (["--host", "h", "--teachers", "image", "--device", 'student-0=cpu"\nx="'], ["unknown --device of student-0 'cpu\"\\nx=\"'"]),
        (["--host", "h", "--teachers", "text,text,text-spare1"], ["--teachers is", "two nodes would be called 'teacher-text-spare1'"]),
        (["--host", "h", "--teachers", "image", "--device", "student-0=cuda:0", "--device", "student-0=cuda:1"], ["'student-0' twice", "cuda:1"]),
        (["--host", "h", "--teachers", "image", "--data-dir", "/x/{nam}"], ["--data-dir is '/x/{nam}'", "{nam} stands for nothing", "{name}"]),
        (["--host", "h", "--teachers", "image", "--home", "/x/{name}/{Name}"], ["--home is '/x/{name}/{Name}'", "{Name} stands for nothing"]),
        (["--host", "h", "--teachers", "image", "--data-dir", "/x/{}"], ["--data-dir is '/x/{}'", "{name}"]),
        (["--host", "h", "--teachers", "image", "--students", "60000"], ["--students is 60000", "at most 56441"]),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(options, mentions, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["cluster", "init", str(tmp_path / "x"), *options])
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert all(mention in said for mention in mentions), said
    assert not (tmp_path / "x").exists()


def test_a_quoted_tilde_is_the_users_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    main(["cluster", "init", "~/lab", "--host", "h", "--teachers", "image", "--insecure"])
    main(["cluster", "move", "~/lab", "--host", "other"])
    assert read_plan(tmp_path / "lab").hosts == ("other",)
    assert not (tmp_path / "~").exists()


def test_a_cluster_is_not_written_over(cluster, refuses):
    folder, _ = cluster()
    key = (folder / "ca.key").read_bytes()
    with pytest.raises(SystemExit):
        cluster()
    assert (folder / "ca.key").read_bytes() == key
    (folder / "cluster.json").write_text("{}")
    refuses(DataError, lambda: read_plan(folder), "holds no cluster")


def test_help_of_every_command(capsys):
    for command in (["cluster", "init"], ["cluster", "move"], ["doctor"]):
        with pytest.raises(SystemExit) as ended:
            build_parser().parse_args([*command, "--help"])
        assert ended.value.code == 0
    assert "--insecure" in capsys.readouterr().out
