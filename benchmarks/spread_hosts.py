"""Hosts for bench_spread and tests (see `namespaces`): each with a disk and a raylet.

Host 0 is Ray's head, with the driver and the package registry. Every host sees its own directory under the same path,
as real hosts do.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from namespaces import Network, inside

_GCS_PORT = 6379
_STARTS_WITHIN_S = 120.0


class Hosts:
    """So many hosts, from `with` to its end. `disk` is where every host sees its own directory.

    Args:
        count: how many; the first one is Ray's head.
        scratch: a directory for the disks and logs; a short path, for Ray's sockets.
        python: that runs the raylets.
        environment: of the raylets.
        instead: directories that only the first host sees -> what the others see there.
        kept: directories below those that all hosts see.
    """

    def __init__(
        self,
        count: int,
        scratch: Path,
        python: Path,
        environment: Mapping[str, str],
        *,
        instead: Mapping[Path, Path] | None = None,
        kept: Sequence[Path] = (),
    ) -> None:
        self._network = Network(count)
        self._names = self._network.names
        self._scratch = scratch
        self._python = python
        self._instead = instead or {}
        self._kept = kept
        self.disk = scratch / "disk"
        self._environment = {
            **environment,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_enable_metrics_collection": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "NEMO_RL_VENV_DIR": str(self.disk / "venvs"),
            "UV_CACHE_DIR": str(self.disk / "cache"),
            "HOME": str(self.disk),
        }
        self._raylets: list[subprocess.Popen[bytes]] = []

    def address(self, host: int) -> str:
        return self._network.address(host)

    def __enter__(self) -> Hosts:
        try:
            self.disk.mkdir(exist_ok=True)
            self._network.__enter__()
            for host in range(len(self._names)):
                self._raylets.append(self._start_raylet(host))
                if host == 0:
                    self._await_head()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for raylet in reversed(self._raylets):  # and with it everything in its process namespace
            raylet.kill()
            raylet.wait()
        self._network.__exit__()
        _remove([_accounting(name) for name in self._names])

    def _start_raylet(self, host: int) -> subprocess.Popen[bytes]:
        own = self._scratch / f"disk{host}"
        own.mkdir()
        ray = [str(self._python), "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--num-gpus=0"]
        ray += [f"--node-ip-address={self.address(host)}", f"--object-store-memory={256 * 2**20}"]
        ray += ["--disable-usage-stats"]
        if host == 0:
            ray += ["--head", f"--port={_GCS_PORT}", "--include-dashboard=false", f"--temp-dir={self.disk}/ray"]
        else:
            ray += [f"--address={self.address(0)}:{_GCS_PORT}"]
        steps = [f"mount --bind {own} {self.disk}", *(self._replacing(host) if host else ())]
        group = _accounting(self._names[host])
        group.mkdir(exist_ok=True)
        counted = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        log = self._scratch / f"host{host}.log"
        return self._network.start(host, steps, ray, self._environment, log, within=counted)

    def _replacing(self, host: int) -> Iterator[str]:
        """Shell commands, for a host's mount namespace, that replace directories there."""
        for number, path in enumerate(self._kept):
            spare = self._scratch / f"kept{host}.{number}"
            spare.mkdir()
            yield f"mount --bind {path} {spare}"
        for path, other in self._instead.items():
            yield f"mount --bind {other} {path}"
        for number, path in enumerate(self._kept):
            yield f"mkdir -p {path} && mount --bind {self._scratch / f'kept{host}.{number}'} {path}"

    def _await_head(self) -> None:
        deadline = time.monotonic() + _STARTS_WITHIN_S
        check = f"import socket; socket.create_connection(('{self.address(0)}', {_GCS_PORT})).close()"
        command = ["ip", "netns", "exec", self._names[0], str(self._python), "-c", check]
        while subprocess.run(command, capture_output=True, check=False).returncode:
            if self._raylets[0].poll() is not None or time.monotonic() > deadline:
                raise SystemExit("Ray's head did not start:\n" + (self._scratch / "host0.log").read_text()[-2000:])
            time.sleep(0.2)

    def on_head(self, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on host 0, with its disk and processes."""
        return inside(self._raylets[0], command)

    def driver_environment(self) -> dict[str, str]:
        """Of a driver on host 0."""
        return {**self._environment, "RAY_ADDRESS": f"{self.address(0)}:{_GCS_PORT}"}

    def sent_bytes(self, host: int) -> int:
        """What a host has sent over its link since it came up."""
        command = ["ip", "netns", "exec", self._names[host], "cat", "/sys/class/net/eth0/statistics/tx_bytes"]
        with contextlib.suppress(ValueError):
            return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return 0

    def accounting(self) -> list[str]:
        """For `cpu_seconds`: one path per host."""
        return [str(_accounting(name)) for name in self._names]


def _remove(groups: list[Path]) -> None:
    """Remove control groups as soon as the kernel has buried their processes."""
    for group in groups:
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
            if not group.exists():
                break
            time.sleep(0.1)


def cpu_seconds(accounting: str) -> float:
    """What all processes of a host, those that ended included, have used so far."""
    group = Path(accounting)
    if (group / "cpuacct.usage").exists():
        return int((group / "cpuacct.usage").read_text()) / 1e9
    return int((group / "cpu.stat").read_text().split()[1]) / 1e6


def _accounting(name: str) -> Path:
    """The control group of a host, which counts its CPU time (version 1 or 2)."""
    first = Path("/sys/fs/cgroup/cpuacct")
    return (first if first.is_dir() else first.parent) / name


@contextlib.contextmanager
def on_network_of_host_0(hosts: Hosts, command: Sequence[str]) -> Iterator[None]:
    """A server on host 0 while the block runs."""
    process = subprocess.Popen(hosts.on_head(command))
    try:
        yield
    finally:
        process.terminate()
        process.wait()
