"""``ckd-fed run``: ``flwr run``, then wait, show the log, and end with an exit code that means something.

``flwr run`` returns 0 when the app failed, and on a local connection leaves a SuperLink in the background that keeps the environment
of the first run. Here a local connection gets a SuperLink of its own, with today's environment, on free ports, stopped at the end,
also where the end is a signal. Flower is driven through its command line only.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from ckd_fed.errors import CkdError, ConfigError

_STARTUP_SECONDS = 30.0
_POLL_SECONDS = 2.0
_SILENCE_SECONDS = 120.0  # for which a SuperLink may not say how the run is: it restarts, or the network is gone for a moment
_STOP_SECONDS = 30.0
_END_SECONDS = 5.0  # for what a SuperLink leaves behind
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C; `timeout`, CI and systemd; a terminal that was closed
_LOCAL = (":local:", ":local-in-memory:")


class RunError(CkdError):
    """The run failed, was stopped or could not be started."""


def flower_run(
    app: Path, connection: str | None, overrides: Sequence[str], write: Callable[[str], None], follow: Callable[[str], None] | None = None
) -> None:
    """Run a Flower app to its end, showing its log.

    Args:
        app: the app's directory.
        connection: name of a SuperLink connection; None for the default one.
        overrides: of the run configuration, as for ``flwr run -c``.
        write: prints one line.
        follow: takes every line of the run's log; None leaves them to flwr's own output.

    Raises:
        RunError: the run did not complete, or a signal ended it; the message ends with the reason.
    """
    environment = {**os.environ, "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    environment.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    environment.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.1")  # a second otherwise, before the ServerApp is started
    environment.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with _orderly_end(), _superlink(connection, environment, write):
        _run(app, connection, overrides, environment, follow)


def app_config(app: Path) -> dict[str, Any]:
    """The run configuration that a Flower app declares, ``[tool.flwr.app.config]``.

    Raises:
        ConfigError: no Flower app in that directory.
    """
    path = app / "pyproject.toml"
    if not path.is_file():
        raise ConfigError(f"{app} is no Flower app: it has no pyproject.toml; name a directory such as simulations/baby")
    try:
        declared = tomllib.loads(path.read_text())["tool"]["flwr"]["app"].get("config", {})
    except (tomllib.TOMLDecodeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} declares no Flower app ([tool.flwr.app]): {error}") from None
    return dict(declared)


def _run(app: Path, connection: str | None, overrides: Sequence[str], environment: dict[str, str], follow: Callable[[str], None] | None) -> None:
    target = [connection] if connection else []
    options = [word for override in overrides for word in ("-c", override)]
    try:
        started = _json(["run", str(app), *target, "--format", "json", *options], environment)
    except KeyboardInterrupt as interrupt:
        if _is_local(connection):  # its SuperLink ends with us
            raise
        seen = shlex.join(["flwr", "ls", *target])
        raise RunError(f"{interrupt}; the run may have been submitted all the same: `{seen}` shows it, `flwr stop` ends it") from None
    run_id = str(started.get("run-id") or "")
    if not run_id:
        raise RunError(f"flwr run did not start: {started.get('error-message') or started}")
    try:
        _log([*_flwr(), "log", run_id, *target, "--stream"], environment, follow)
        status, details = _wait(run_id, target, environment)
    except KeyboardInterrupt as interrupt:
        raise RunError(f"{interrupt}; {_stop(run_id, target, environment)}") from None
    if status != "finished:completed":
        raise RunError(f"run {run_id} ended as {status.partition(':')[2] or status}: {_reason(details)}")


@contextmanager
def _on_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Hand over the signals that would end this process; those that are ignored already stay so: ``nohup`` means it."""
    before = {each: signal.getsignal(each) for each in _ENDING if signal.getsignal(each) != signal.SIG_IGN}
    try:
        for each in before:
            signal.signal(each, handler)
        yield
    finally:
        for each, previous in before.items():
            signal.signal(each, previous)


@contextmanager
def _orderly_end() -> Iterator[None]:
    """A signal interrupts the context, so that it ends what it started; further ones are ignored meanwhile.

    Raises:
        RunError: one came.
    """

    def interrupt(number: int, frame: object) -> None:
        for each in _ENDING:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(f"interrupted by {signal.Signals(number).name}")

    with _on_signals(interrupt):
        try:
            yield
        except KeyboardInterrupt as interrupted:
            raise RunError(str(interrupted)) from None


def _stop(run_id: str, target: Sequence[str], environment: dict[str, str]) -> str:
    """Ask a run to stop; returns in words whether that went well."""
    command = [*_flwr(), "stop", run_id, *target]
    try:
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_STOP_SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return f"run {run_id} could not be asked to stop; if it goes on, end it by `flwr {' '.join(command[1:])}`"
    return f"run {run_id} was asked to stop"


def _log(command: Sequence[str], environment: dict[str, str], follow: Callable[[str], None] | None) -> None:
    if follow is None:
        subprocess.run(command, env=environment, check=False)
        return
    unbuffered = {**environment, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=unbuffered, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        try:
            for line in process.stdout or ():
                follow(line)
        except BaseException:
            process.kill()  # it would go on for as long as the run does, and be waited for
            raise


def _wait(run_id: str, target: Sequence[str], environment: dict[str, str]) -> tuple[str, str]:
    """Ask for the run's state until it has ended; returns its status and what Flower says of it."""
    heard = time.monotonic()
    while True:
        try:
            status, details = _status(run_id, target, environment)
        except RunError as error:
            if time.monotonic() - heard > _SILENCE_SECONDS:
                hint = f"ask by `flwr {' '.join(['ls', *target, '--run-id', run_id])}` how it is"
                raise RunError(f"nothing was heard of run {run_id} for {_SILENCE_SECONDS:.0f} s; {hint}; the last answer was: {error}") from None
        else:
            heard = time.monotonic()
            if status.startswith("finished"):
                return status, details
        time.sleep(_POLL_SECONDS)


def _status(run_id: str, target: Sequence[str], environment: dict[str, str]) -> tuple[str, str]:
    listed = _json(["ls", *target, "--run-id", run_id, "--format", "json"], environment)
    runs = listed.get("runs") or [{}]
    status = str(runs[0].get("status", ""))
    if not status:
        raise RunError(f"flwr ls does not know run {run_id}: {listed.get('error-message') or listed}")
    return status, str(runs[0].get("status-details") or "")


def _json(arguments: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run([*_flwr(), *arguments], env=environment, check=False, capture_output=True, text=True)
    start = done.stdout.find("{")
    try:
        found = json.loads(done.stdout[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        found = {}
    if not isinstance(found, dict) or not found:
        said = " ".join((done.stderr + " " + done.stdout).split())
        raise RunError(f"flwr {arguments[0]} failed: {said[-600:] or f'exit code {done.returncode}, no output'}")
    return found


def _reason(details: str) -> str:
    lines = [line.strip() for line in details.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given; see the log above"


def _flwr() -> list[str]:
    return [_tool("flwr")]


def _tool(name: str) -> str:
    """A command of this very environment, whatever PATH says."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if not found:
        raise RunError(f"the command {name} is not installed beside {sys.executable}; install ckd_fed into an environment of its own")
    return found


def _is_local(connection: str | None) -> bool:
    """Whether Flower's configuration makes a connection a local simulation; so is the default one where there is no configuration."""
    path = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr") / "config.toml"
    if not path.is_file():
        return connection in (None, "local")
    try:
        table = tomllib.loads(path.read_text()).get("superlink", {})
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    entry = table.get(connection or table.get("default", "local"), {})
    return isinstance(entry, dict) and entry.get("address") in _LOCAL


@contextmanager
def _superlink(connection: str | None, environment: dict[str, str], write: Callable[[str], None]) -> Iterator[None]:
    """For a local connection, a SuperLink of our own for as long as the context lasts; nothing for any other."""
    if not _is_local(connection):
        yield
        return
    http, control = _free_port(), _free_port()
    environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"], environment["FLWR_LOCAL_CONTROL_API_PORT"] = str(http), str(control)
    log = Path(tempfile.mkdtemp(prefix="ckd-fed-superlink-")) / "superlink.log"
    command = [_tool("flower-superlink")]
    command += ["--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(http)]
    command += ["--control-api-address", f"127.0.0.1:{control}"]
    # Processes that the SuperLink starts by name (flwr-simulation and the like) must be this environment's.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    came: list[int] = []
    with log.open("wb") as file, _on_signals(lambda number, frame: came.append(number)):  # none may come between starting it and knowing it
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        for number in came:
            signal.raise_signal(number)
        _await_health(process, http, log)
        yield
    except BaseException:
        write(f"the log of the SuperLink that was started for this run: {log}")
        raise
    finally:
        started = _descendants(process.pid)
        process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
        finally:
            # A SuperLink that was killed leaves the processes that it started behind, and one that was asked to end what they started in
            # turn: a simulation, in a session of their own, that has not heard yet that its run was stopped and then never will.
            _end_groups({process.pid, *(group for _, group in started)}, [one for one, _ in started])
            process.wait()
    log.unlink()
    log.parent.rmdir()


def _descendants(pid: int) -> list[tuple[psutil.Process, int]]:
    """What a process has started, and what that has, each with its process group."""
    found = []
    with suppress(psutil.Error):
        for one in psutil.Process(pid).children(recursive=True):
            with suppress(ProcessLookupError):
                found.append((one, os.getpgid(one.pid)))
    return found


def _end_groups(groups: set[int], members: Sequence[psutil.Process]) -> None:
    """Ask process groups to end, wait a little for the members that are known, and kill what is left; never this process' own."""
    groups = groups - {os.getpgrp()}
    for number in (signal.SIGTERM, signal.SIGKILL):
        for group in groups:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)
        psutil.wait_procs(members, timeout=_END_SECONDS)


def _await_health(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _STARTUP_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise RunError(f"the local SuperLink did not start within {_STARTUP_SECONDS:.0f} s; its log is {log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
