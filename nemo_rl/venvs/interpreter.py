"""Query the version, platform and packages of this process's Python and of other interpreters."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import default_environment

from nemo_rl.errors import IncompatibleVenvError, VenvError

_QUERY_TIMEOUT_S = 60.0

# Runs in the other interpreter and uses the standard library only.
_QUERY = """
import importlib.metadata, json, os, platform, sys
def ray():
    try: return importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError: return None
info = sys.version_info
print(json.dumps({
    "executable": os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable),
    "prefix": sys.prefix, "base_prefix": sys.base_prefix, "ray": ray(),
    "site_paths": [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")],
    "cache_tag": (sys.implementation.cache_tag or "") + getattr(sys, "abiflags", ""),
    "markers": {
        "implementation_name": sys.implementation.name,
        "implementation_version": "%d.%d.%d" % sys.implementation.version[:3],
        "os_name": os.name, "platform_machine": platform.machine(), "platform_release": platform.release(),
        "platform_system": platform.system(), "platform_version": platform.version(),
        "python_full_version": platform.python_version(), "python_version": "%d.%d" % info[:2],
        "platform_python_implementation": platform.python_implementation(), "sys_platform": sys.platform,
    },
}))
"""


@dataclass(frozen=True)
class PythonInfo:
    """Describes an interpreter as far as the choice of packages depends on it.

    Attributes:
        executable: path of the base interpreter (never the link in a venv).
        version: full version, such as `3.11.7`.
        implementation: such as `cpython-311`, with ABI flags.
        platform: such as `linux-x86_64-glibc`.
    """

    executable: str
    version: str
    implementation: str
    platform: str

    def identity(self) -> dict[str, str]:
        """Return the attributes that are equal on all nodes that can use the same venv."""
        return {"version": self.version, "implementation": self.implementation, "platform": self.platform}


@dataclass(frozen=True)
class DriverVersions:
    """Holds the versions that every worker of a job must have, because Ray refuses to mix versions.

    Attributes:
        python: full version of Python; None to accept any.
        ray: version of ray; None to accept any, also if the driver has no ray.
    """

    python: str | None
    ray: str | None

    @staticmethod
    def any() -> DriverVersions:
        """Return the versions for a Python that Ray does not start: every version is accepted."""
        return DriverVersions(None, None)

    @staticmethod
    def of_this_process() -> DriverVersions:
        """Return the versions of this process."""
        try:
            ray = importlib.metadata.version("ray")
        except importlib.metadata.PackageNotFoundError:
            ray = None
        return DriverVersions(platform.python_version(), ray)

    def check(self, what: str, python: str, ray: str | None, *, remedy: str = "") -> None:
        """Raise `IncompatibleVenvError` if `python` or `ray` differs from the driver's version.

        Args:
            what: the subject of the message, such as "The venv 'a'".
            ray: None is accepted.
            remedy: how to get the driver's Python; default: install it on this node.
        """
        if self.python is not None and python != self.python:
            raise IncompatibleVenvError(
                f"{what} has Python {python}, but the driver runs Python {self.python}, and Ray refuses to mix them. "
                f"Start the driver with Python {python}, or {remedy or f'install Python {self.python} on this node'}."
            )
        if ray is not None and self.ray is not None and ray != self.ray:
            raise IncompatibleVenvError(
                f"{what} has ray {ray}, but the driver runs ray {self.ray}, and Ray refuses to mix them. Lock the same "
                f"version for both (ray=={self.ray}, then `uv lock`), or start the driver from that project."
            )


@functools.cache
def this_python() -> PythonInfo:
    """Return the interpreter of this process; in a venv, the base interpreter."""
    base = getattr(sys, "_base_executable", None) or sys.executable
    return PythonInfo(
        executable=os.path.realpath(base),
        version=platform.python_version(),
        implementation=f"{sys.implementation.cache_tag}{sys.abiflags}",
        platform=_platform(sys.platform, platform.machine()),
    )


def this_environment() -> dict[str, str]:
    """Return the values of environment markers (PEP 508) for this process's Python."""
    return {key: str(value) for key, value in default_environment().items()}


@dataclass(frozen=True)
class QueriedPython:
    """Holds the answer of another interpreter.

    Attributes:
        info: version and platform.
        markers: values of environment markers (PEP 508).
        prefix: `sys.prefix`.
        site_paths: its site-packages directories, in the order of `sys.path`.
        ray: version of ray; None if it has no ray.
    """

    info: PythonInfo
    markers: dict[str, str]
    prefix: str
    site_paths: tuple[str, ...]
    ray: str | None


def query_python(path: str) -> QueriedPython:
    """Start the interpreter at `path` and query it. Raises `VenvError` if it does not start."""
    answer = json.loads(_answer(path, _QUERY))
    markers = answer["markers"]
    info = PythonInfo(
        executable=answer["executable"],
        version=markers["python_full_version"],
        implementation=answer["cache_tag"],
        platform=_platform(markers["sys_platform"], markers["platform_machine"]),
    )
    return QueriedPython(info, markers, answer["prefix"], tuple(answer["site_paths"]), answer["ray"])


def start_python(path: str) -> tuple[str, str]:
    """Start the interpreter at `path`; return its full version and prefix. Faster than `query_python`."""
    version, prefix = _answer(path, "import sys; print(sys.version.split()[0]); print(sys.prefix)").splitlines()
    return version, prefix


def _answer(path: str, script: str) -> str:
    environment = {"PATH": os.defpath, "PYTHONNOUSERSITE": "1", "LC_ALL": "C.UTF-8"}
    command = [path, "-I", "-B", "-c", script]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VenvError(f"The interpreter {path} does not start: {error}") from None
    if done.returncode != 0:
        raise VenvError(f"The interpreter {path} does not start: {done.stderr.strip()[-500:] or done.returncode}")
    return done.stdout


@functools.lru_cache(maxsize=64)
def _query_unchanged(path: str, _stamp: tuple[int, int]) -> QueriedPython:
    return query_python(path)


def query_python_cached(path: str) -> QueriedPython:
    """Query an interpreter as `query_python` does, once per process unless the file at `path` changes."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise VenvError(f"There is no interpreter at {path}: {error.strerror}.") from None
    return _query_unchanged(path, (status.st_mtime_ns, status.st_size))


def _platform(sys_platform: str, machine: str) -> str:
    try:
        libc = (os.confstr("CS_GNU_LIBC_VERSION") or "unknown").split()[0]
    except (ValueError, OSError):
        libc = "musl"
    return f"{sys_platform}-{machine}-{libc}"
