"""`ckd-fed run` with stand-ins for Flower's commands: what is started is ended, whatever ends the run, and the exit code says how it went."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ckd_fed import launch
from ckd_fed.cli import main
from ckd_fed.launch import RunError, app_config, flower_run

INTERPRETER = sys.executable  # tests put another one in its place
SUPERLINK = """\
    import http.server, os, pathlib, subprocess, sys
    spawned = subprocess.Popen(["sleep", "300"])
    detached = subprocess.Popen(["sleep", "300"], start_new_session=True)  # as the real one starts what starts a simulation
    pathlib.Path({pids!r}).write_text(f"{{os.getpid()}} {{spawned.pid}} {{detached.pid}}")
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
        def log_message(self, *words):
            pass
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Health).serve_forever()
"""


@pytest.fixture
def flower(tmp_path, monkeypatch):
    """Stand-ins beside the interpreter, where the real commands are looked for; a mapping says what ``flwr <command>`` does, in bash."""
    tools, pids = tmp_path / "bin", tmp_path / "pids"
    tools.mkdir()
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tools / "python"))
    monkeypatch.setattr(launch, "_POLL_SECONDS", 0.05)

    def tool(name, content):
        (tools / name).write_text(content)
        (tools / name).chmod(0o755)

    def install(**does):
        does = {"run": """echo '{"run-id": "7"}'""", "log": "echo from the app", "ls": listed("finished:completed"), "stop": "true", **does}
        cases = "\n".join(f"{name}) {action} ;;" for name, action in does.items())
        tool("flwr", f'#!/usr/bin/env bash\necho "$*" >> {tmp_path}/asked\ncase "$1" in\n{cases}\nesac\n')
        tool("flower-superlink", f"#!{INTERPRETER} -I\n" + textwrap.dedent(SUPERLINK.format(pids=str(pids))))

    install()
    return install


def listed(status, details=""):
    return f"""echo '{{"success": true, "runs": [{{"status": "{status}", "status-details": "{details}"}}]}}'"""


def asked(tmp_path):
    return [line.split()[0] for line in (tmp_path / "asked").read_text().splitlines()]


def left_behind(tmp_path):
    """Processes of the stand-in SuperLink that still run; those that were killed a moment ago are given time to end."""
    pids = (tmp_path / "pids").read_text().split()
    deadline = time.monotonic() + 5
    while (left := [pid for pid in pids if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _runs(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()  # ended, and nobody has collected it
    except OSError:
        return False


# It does not hold the pipe that the test reads: a log that was just being started outlives the command until its run has stopped.
ENDLESS = "echo from the app; exec sleep 60 &> /dev/null"
FOLLOWED = """
from pathlib import Path
from ckd_fed import cli, launch
cli._run = lambda arguments: launch.flower_run(Path(arguments.app), None, [], print, lambda line: print(line, end="", flush=True))
"""


@pytest.fixture(autouse=True)
def heard():
    """No signal is ignored from the start, as it is where the tests themselves run in the background or under nohup."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)}
    for each in before:
        signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.fixture
def command(tmp_path):
    """Start ``ckd-fed run`` in a process of its own, with the stand-ins; returns once the app has said something."""
    sources = Path(launch.__file__).parents[1]

    def start(before=""):
        code = f"import sys; sys.executable = {str(tmp_path / 'bin' / 'python')!r}\n{before}\nfrom ckd_fed.cli import main\nmain()"
        words = [INTERPRETER, "-c", code, "run", str(sources / "simulations" / "baby")]
        environment = {**os.environ, "PYTHONPATH": str(sources)}
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        assert process.stdout.readline() == "from the app\n"
        return process

    return start


def test_a_run_that_completes_leaves_nothing_behind(flower, tmp_path):
    flower_run(Path("app"), None, ["seed=1"], print)
    assert asked(tmp_path) == ["run", "log", "ls"]
    assert not left_behind(tmp_path)
    assert not list(tmp_path.glob("ckd-fed-superlink-*"))


def test_what_does_not_end_when_asked_is_killed_and_nothing_else(monkeypatch):
    monkeypatch.setattr(launch, "_END_SECONDS", 0.5)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(300)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn!r}], start_new_session=True).wait()"
    with subprocess.Popen([INTERPRETER, "-c", parent], stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout.readline() == "ready\n"
        ((child, group),) = launch._descendants(process.pid)
        assert group == child.pid != process.pid
        launch._end_groups({process.pid, group, os.getpgrp()}, [child])  # its own group among them, and yet this test goes on
        assert process.wait(5) == -signal.SIGTERM
        assert not child.is_running() or child.status() == "zombie"
    assert launch._descendants(process.pid) == []


def test_a_failed_run_is_an_error_that_ends_with_the_reason(flower, tmp_path, refuses):
    flower(ls=listed("finished:failed", "Traceback\\nConfigError: no such dataset"))
    refuses(RunError, lambda: flower_run(Path("app"), None, [], print), "run 7", "failed", "ConfigError: no such dataset")
    assert not left_behind(tmp_path)


def test_a_run_that_does_not_start_is_an_error(flower, refuses):
    flower(run="""echo '{"success": false, "error-message": "no such app"}'""")
    refuses(RunError, lambda: flower_run(Path("app"), None, [], print), "did not start", "no such app")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("before", ["", FOLLOWED], ids=["log", "terminal"])
def test_a_signal_stops_the_run_and_ends_what_was_started(number, before, flower, tmp_path, command):
    """On a terminal the log is followed line by line, in another way."""
    flower(log=ENDLESS, ls=listed("running"))
    process = command(before)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err.splitlines()[-1] == f"ckd-fed: interrupted by {number.name}; run 7 was asked to stop"
    assert asked(tmp_path)[-1] == "stop"
    assert not left_behind(tmp_path)


def test_a_signal_while_the_superlink_is_being_started_ends_it_too(flower, tmp_path, monkeypatch, refuses):
    real = subprocess.Popen

    def slow(command, **options):
        process = real(command, **options)
        if "flower-superlink" in command[0]:
            while not (tmp_path / "pids").exists():
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", slow)
    refuses(RunError, lambda: flower_run(Path("app"), None, [], print), "interrupted by SIGINT")
    assert not left_behind(tmp_path)
    assert not (tmp_path / "asked").exists()


def test_a_second_signal_does_not_cut_the_end_short(flower, tmp_path, command):
    flower(log=ENDLESS, stop=f"touch {tmp_path}/stopping; sleep 1")
    process = command()
    process.send_signal(signal.SIGTERM)
    while not (tmp_path / "stopping").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert "was asked to stop" in process.communicate(timeout=20)[1]
    assert not left_behind(tmp_path)


def test_a_signal_that_is_ignored_stays_ignored(flower, tmp_path, command):
    """As under nohup."""
    flower(log=f"echo from the app; until [ -e {tmp_path}/go ]; do sleep 0.05; done")
    process = command("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    (tmp_path / "go").touch()
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_a_run_that_cannot_be_asked_to_stop_is_named(flower, command):
    flower(log=ENDLESS, stop="exit 1")
    process = command()
    process.terminate()
    assert "run 7 could not be asked to stop; if it goes on, end it by `flwr stop 7`" in process.communicate(timeout=20)[1]


@pytest.mark.parametrize("silence", ["exit 1", """echo '{"success": false, "error-message": "connection refused"}'""", "echo '{\"runs\": []}'"])
def test_a_superlink_that_says_nothing_for_a_while_ends_nothing(silence, flower, tmp_path):
    flower(ls=f'if [ "$(grep -c ^ls {tmp_path}/asked)" -lt 4 ]; then {silence}; else {listed("finished:completed")}; fi')
    flower_run(Path("app"), None, [], print)
    assert asked(tmp_path).count("ls") == 4


def test_a_superlink_that_says_nothing_any_more_is_given_up_with_the_reason(flower, tmp_path, monkeypatch, refuses):
    monkeypatch.setattr(launch, "_SILENCE_SECONDS", 0.3)
    flower(ls="echo connection refused >&2; exit 1")
    refuses(RunError, lambda: flower_run(Path("app"), None, [], print), "nothing was heard of run 7", "flwr ls --run-id 7", "connection refused")
    assert asked(tmp_path).count("ls") > 1
    assert not left_behind(tmp_path)


def test_another_connection_gets_no_superlink_of_its_own(flower, tmp_path):
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "config.toml").write_text('[superlink.lab]\naddress = "gpu0.example:8000"\n')
    flower_run(Path("app"), "lab", [], print)
    assert (tmp_path / "asked").read_text().splitlines() == ["run app lab --format json", "log 7 lab --stream", "ls lab --run-id 7 --format json"]
    assert not (tmp_path / "pids").exists()


def test_a_superlink_that_does_not_start_is_an_error_with_its_log(flower, tmp_path, monkeypatch, refuses):
    (tmp_path / "bin" / "flower-superlink").write_text("#!/usr/bin/env bash\nexit 3\n")
    message = refuses(RunError, lambda: flower_run(Path("app"), None, [], print), "did not start")
    assert Path(message.rpartition(" ")[2]).is_file()


def test_a_folder_without_an_app_is_named(tmp_path, refuses):
    refuses(launch.ConfigError, lambda: app_config(tmp_path), tmp_path, "no Flower app")


def test_a_key_that_the_app_does_not_name_is_refused_before_anything_starts(tmp_path, capsys, monkeypatch):
    """An option of a backbone of one's own: Flower would refuse it without saying what to do."""
    declared = '[tool.flwr.app.config]\ndataset = "baby"\nbackbone = "on_the_nodes_only:Model"\n[tool.flwr.app.config.model]\nlayers = ""\n'
    (tmp_path / "pyproject.toml").write_text(declared)
    started = []
    monkeypatch.setattr("ckd_fed.launch.flower_run", lambda *arguments: started.append(arguments))
    with pytest.raises(SystemExit):
        main(["run", str(tmp_path), "-c", "model.depth=3"])
    assert f"model.depth, and Flower takes no key that the app does not name: write it into {tmp_path}/pyproject.toml" in capsys.readouterr().err
    main(["run", str(tmp_path), "-c", 'dataset="baby" model.layers=3'])
    assert len(started) == 1
