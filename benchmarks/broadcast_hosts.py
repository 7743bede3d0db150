"""Simulates hosts with a disk and a raylet each, for bench_broadcast and tests. See `namespaces`.

Host 0 runs Ray's head, the driver and the package index. Every host has its own directory under the same path, like
real hosts.
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
_START_TIMEOUT_S = 120.0


class Hosts:
    """Runs simulated hosts for the duration of a `with` block.

    Attributes:
        disk: the path at which every host has its own directory.

    Args:
        count: number of hosts. The first host is Ray's head.
        scratch: directory for the disks and logs. The path must be short, because of Ray's sockets.
        python: interpreter of the raylets.
        environment: environment variables of the raylets.
        instead: maps directories of the first host to the directories that the other hosts see at the same path.
        kept: directories below those in `instead` that all hosts share.
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
        for raylet in reversed(self._raylets):  # which kills all processes of its namespace
            raylet.kill()
            raylet.wait()
        self._network.__exit__()
        _remove([_accounting(name) for name in self._names])

    def _start_raylet(self, host: int) -> subprocess.Popen[bytes]:
        disk = self._scratch / f"disk{host}"
        disk.mkdir()
        ray = [str(self._python), "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--num-gpus=0"]
        ray += [f"--node-ip-address={self.address(host)}", f"--object-store-memory={256 * 2**20}"]
        ray += ["--disable-usage-stats"]
        if host == 0:
            ray += ["--head", f"--port={_GCS_PORT}", "--include-dashboard=false", f"--temp-dir={self.disk}/ray"]
        else:
            ray += [f"--address={self.address(0)}:{_GCS_PORT}"]
        steps = [f"mount --bind {disk} {self.disk}", *(self._replacing(host) if host else ())]
        group = _accounting(self._names[host])
        group.mkdir(exist_ok=True)
        counted = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        log = self._scratch / f"host{host}.log"
        return self._network.start(host, steps, ray, self._environment, log, within=counted)

    def _replacing(self, host: int) -> Iterator[str]:
        """Yield shell commands that replace directories in the mount namespace of a host."""
        for number, path in enumerate(self._kept):
            spare = self._scratch / f"kept{host}.{number}"
            spare.mkdir()
            yield f"mount --bind {path} {spare}"
        for path, other in self._instead.items():
            yield f"mount --bind {other} {path}"
        for number, path in enumerate(self._kept):
            yield f"mkdir -p {path} && mount --bind {self._scratch / f'kept{host}.{number}'} {path}"

    def _await_head(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        check = f"import socket; socket.create_connection(('{self.address(0)}', {_GCS_PORT})).close()"
        command = ["ip", "netns", "exec", self._names[0], str(self._python), "-c", check]
        while subprocess.run(command, capture_output=True, check=False).returncode:
            if self._raylets[0].poll() is not None or time.monotonic() > deadline:
                raise SystemExit("Ray's head did not start:\n" + (self._scratch / "host0.log").read_text()[-2000:])
            time.sleep(0.2)

    def on_head(self, command: Sequence[str]) -> list[str]:
        """Return the command line that runs `command` in the namespaces of host 0."""
        return inside(self._raylets[0], command)

    def driver_environment(self) -> dict[str, str]:
        """Return the environment variables of a driver on host 0."""
        return {**self._environment, "RAY_ADDRESS": f"{self.address(0)}:{_GCS_PORT}"}

    def sent_bytes(self, host: int) -> int:
        """Return the bytes that a host has sent over its link."""
        command = ["ip", "netns", "exec", self._names[host], "cat", "/sys/class/net/eth0/statistics/tx_bytes"]
        with contextlib.suppress(ValueError):
            return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return 0

    def accounting(self) -> list[str]:
        """Return one path per host, for `cpu_seconds`."""
        return [str(_accounting(name)) for name in self._names]


def _remove(groups: list[Path]) -> None:
    """Remove control groups once the kernel has released their processes."""
    for group in groups:
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
            if not group.exists():
                break
            time.sleep(0.1)


def cpu_seconds(accounting: str) -> float:
    """Return the CPU seconds of all processes of a host, including those that have ended."""
    group = Path(accounting)
    if (group / "cpuacct.usage").exists():
        return int((group / "cpuacct.usage").read_text()) / 1e9
    return int((group / "cpu.stat").read_text().split()[1]) / 1e6


def _accounting(name: str) -> Path:
    """Return the control group (version 1 or 2) that accounts for the CPU time of a host."""
    first = Path("/sys/fs/cgroup/cpuacct")
    return (first if first.is_dir() else first.parent) / name


@contextlib.contextmanager
def on_network_of_host_0(hosts: Hosts, command: Sequence[str]) -> Iterator[None]:
    """Run a server on host 0 for the duration of the block."""
    process = subprocess.Popen(hosts.on_head(command))
    try:
        yield
    finally:
        process.terminate()
        process.wait()
