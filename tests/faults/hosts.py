"""Hosts that live on one machine: a network namespace with an address of its own for each process, joined by a bridge.

Needs Linux, root and iproute2. What runs in a namespace sees no interface of the machine, only its own end of a cable to the bridge.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence


class Hosts:
    """One host for each name, at 10.231.<part>.2 and on; the machine itself is 10.231.<part>.1.

    Args:
        names: of the hosts.

    Raises:
        SystemExit: not root, or no ``ip`` command.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if os.geteuid() or not shutil.which("ip"):
            raise SystemExit("network namespaces need root and the command ip (iproute2); run it as root, or without --hosts")
        part = os.getpid() % 254
        self._tag = f"ckd{part}"
        self.addresses = {name: f"10.231.{part}.{index}" for index, name in enumerate(names, 2)}
        self._ends = {name: f"{self._tag}v{index}" for index, name in enumerate(names, 2)}  # at the bridge; at most 15 characters
        try:
            _ip("link", "add", self._tag, "type", "bridge")
            _ip("addr", "add", f"10.231.{part}.1/24", "dev", self._tag)
            _ip("link", "set", self._tag, "up")
            for name in names:
                self._add(name)
        except BaseException:
            self.remove()
            raise

    def _add(self, name: str) -> None:
        space, end = self._space(name), self._ends[name]
        _ip("netns", "add", space)
        _ip("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", end, "master", self._tag)
        _ip("link", "set", end, "up")
        _ip("-n", space, "addr", "add", f"{self.addresses[name]}/24", "dev", "eth0")
        for own in ("lo", "eth0"):
            _ip("-n", space, "link", "set", own, "up")

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def command(self, name: str) -> list[str]:
        """What a command line starts with in order to run on a host."""
        return ["ip", "netns", "exec", self._space(name)]

    def cut(self, name: str) -> None:
        """Pull a host's cable."""
        _ip("link", "set", self._ends[name], "down")

    def mend(self, name: str) -> None:
        """Plug it in again."""
        _ip("link", "set", self._ends[name], "up")

    def remove(self) -> None:
        """Take everything away; what is not there is passed over."""
        for name in self.addresses:
            _ip("link", "del", self._ends[name], check=False)
            _ip("netns", "del", self._space(name), check=False)
        _ip("link", "del", self._tag, check=False)


def _ip(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"ip {' '.join(arguments)} failed: {done.stderr.strip()}")
