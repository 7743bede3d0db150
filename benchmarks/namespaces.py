"""Simulates hosts on one machine with namespaces for network, mounts, processes and host name.

::

    switch (namespace with a bridge) ── 10.88.0.1  host 0
                                     ── 10.88.0.2  host 1
                                     ── ...

Needs root and iproute2. All processes of a host end with the process that `start` returns.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_SUBNET = "10.88.0"


class Network:
    """Connects `count` hosts to each other, and to nothing else, for the duration of a `with` block."""

    def __init__(self, count: int) -> None:
        self.names = [f"nrl{os.getpid() % 10000}h{i}" for i in range(count)]
        self._switch = f"nrl{os.getpid() % 10000}sw"

    def address(self, host: int) -> str:
        return f"{_SUBNET}.{host + 1}"

    def __enter__(self) -> Network:
        try:
            self._connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.names, self._switch):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def _connect(self) -> None:
        _run(f"ip netns add {self._switch}", f"ip -n {self._switch} link add sw type bridge")
        _run(f"ip -n {self._switch} link set sw up")
        for host, name in enumerate(self.names):
            _run(
                f"ip netns add {name}",
                f"ip -n {self._switch} link add p{host} type veth peer name eth0 netns {name}",
                f"ip -n {self._switch} link set p{host} master sw up",
                f"ip -n {name} addr add {self.address(host)}/24 dev eth0",
                f"ip -n {name} link set eth0 up",
                f"ip -n {name} link set lo up",
            )

    def start(
        self,
        host: int,
        setup: Sequence[str],
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        within: Sequence[str] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a host's first process.

        Args:
            host: number of the host.
            setup: shell commands that run in the host's mount namespace before `command`.
            command: the process to start.
            environment: its environment variables.
            log: file for its output.
            within: command line that wraps the host, for example to run it in a control group.
        """
        shell = " && ".join([*setup, "cd /", f"exec {shlex.join(command)}"])
        isolated = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", shell]
        with log.open("wb") as output:
            return subprocess.Popen(
                [*within, "nsenter", f"--net=/var/run/netns/{self.names[host]}", *isolated],
                env=dict(environment),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


def inside(first: subprocess.Popen[bytes], command: Sequence[str]) -> list[str]:
    """Return the command line that runs `command` in the host whose first process `start` returned."""
    while not (children := Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()):
        if first.poll() is not None:
            raise SystemExit("the first process of a host exited early; see its log")
        time.sleep(0.05)
    return ["nsenter", f"--target={children[0]}", "--net", "--mount", "--uts", "--pid", *command]


def _run(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True, capture_output=True)
