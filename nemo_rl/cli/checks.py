"""The checks of `nemo-rl doctor`: functions that check this machine and suggest fixes."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from nemo_rl import settings
from nemo_rl.errors import LockMismatchError, NemoRLError
from nemo_rl.venvs import Store

OK, WARNING, FATAL = "ok", "warning", "fatal"

_GB = 10**9
# Less than the first is too little for any venv with packages. The second is enough for all venvs and the cache of uv
# (about 20 GB) and for a rebuild.
_MIN_FREE_GB, _GOOD_FREE_GB = 2, 40
_MIN_SHM_GB = 1
_MIN_FILES = 4096
MAX_CLOCK_OFFSET_S = 5.0
# Default ports of a Ray head.
_RAY_PORTS = {6379: "GCS", 10001: "client server", 8265: "dashboard and job server", 52365: "agent"}
_SHARED = ("nfs", "nfs4", "lustre", "gpfs", "cephfs", "beegfs", "fuse.juicefs", "wekafs", "9p", "cifs", "smb3", "afs")


@dataclass(frozen=True)
class Check:
    """Holds the result of one check.

    Attributes:
        name: subject of the check.
        state: `ok`, `warning` (may cause problems) or `fatal` (would stop a run).
        found: the value or state that was found.
        fix: suggested fix; empty if `ok`.
    """

    name: str
    state: str
    found: str
    fix: str = ""


def run_checks() -> list[Check]:
    """Run all checks of this machine in a fixed order. Temporary probe files are removed."""
    checks: list[Callable[[], Check | Iterator[Check]]] = [
        check_python,
        check_uv,
        check_project,
        check_ray,
        check_token,
        check_cpu,
        check_gpu,
        check_home,
        check_disk,
        check_shm,
        check_open_files,
        check_ports,
        check_clock,
        check_shared_filesystem,
        check_locks,
    ]
    results: list[Check] = []
    for check in checks:
        try:
            result = check()
            results.extend([result] if isinstance(result, Check) else result)
        except OSError as error:  # a check that fails must not hide the other checks
            name = check.__name__.removeprefix("check_").replace("_", " ")
            results.append(Check(name, WARNING, f"the check failed: {error}", "check the permissions of that path"))
    return results


def _nearest(path: Path) -> Path:
    """Return the deepest existing directory at or above `path` that this user can access."""

    def exists(candidate: Path) -> bool:
        try:
            return candidate.is_dir()
        except PermissionError:
            return False

    return next(filter(exists, (path, *path.parents)), Path("/"))


def check_python() -> Check:
    """Check the Python version and whether ray has wheels for the platform."""
    version, machine = platform.python_version(), platform.machine()
    found = f"{version} at {sys.executable}, {platform.system()} {machine}"
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        return Check("Python", FATAL, found, "use Python 3.11, 3.12 or 3.13: uv venv --python 3.11")
    if platform.system() != "Linux" or machine not in ("x86_64", "aarch64"):
        return Check("Python", FATAL, found, "use Linux on x86_64 or aarch64; ray has no wheels for other platforms")
    return Check("Python", OK, found)


def check_uv() -> Check:
    """Check that uv runs."""
    from nemo_rl.venvs.uv import find_uv

    try:
        path = find_uv()
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (NemoRLError, OSError, subprocess.SubprocessError) as error:
        return Check("uv", FATAL, str(error), f"pip install uv, or set {settings.UV.name}")
    return Check("uv", OK, f"{done.stdout.strip()} at {path}")


def check_project() -> Check:
    """Check that uv.lock exists and matches pyproject.toml."""
    from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES
    from nemo_rl.venvs import plan

    root = settings.project_root()
    try:
        num_packages = len(plan(PY_EXECUTABLES.BASE).packages)
    except LockMismatchError as error:
        return Check("lock", FATAL, str(error).partition("\n")[0], f"run `uv lock` in {root}")
    except NemoRLError as error:
        return Check("lock", FATAL, str(error).partition("\n")[0], f"set {settings.PROJECT_ROOT.name} to the project")
    return Check("lock", OK, f"{root}: {num_packages} packages for the base venv")


def check_ray() -> Check:
    """Check that ray is installed and that the cluster at RAY_ADDRESS is reachable."""
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return Check("Ray", FATAL, "not installed", "uv sync --locked")
    address = settings.RAY_ADDRESS.get()
    if address in (None, "local", "auto"):
        return Check("Ray", OK, f"{version}; RAY_ADDRESS {'is not set' if address is None else address}")
    parts = urllib.parse.urlsplit(address if "//" in address else f"//{address}")
    with contextlib.suppress(OSError, ValueError):
        socket.create_connection((parts.hostname or "", parts.port or 6379), timeout=5).close()
        return Check("Ray", OK, f"{version}; the cluster at {address} answers")
    fix = "start it (`ray start --head`), correct RAY_ADDRESS, or unset it to run on this machine only"
    return Check("Ray", FATAL, f"{version}; no connection to RAY_ADDRESS={address}", fix)


def check_token() -> Check:
    """Check that the token of the Ray cluster exists and is private.

    The token allows its holder to run code on the cluster. Without a token, access to its ports is enough.
    """
    variables, address = settings.snapshot(), settings.RAY_ADDRESS.get()
    if variables.get("RAY_AUTH_TOKEN"):
        return Check("token", OK, "in RAY_AUTH_TOKEN")
    home = settings.home_dir() or Path("/")
    path = Path(variables.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    if not path.is_file():
        if variables.get("RAY_AUTH_MODE") == "token" and address not in (None, "local"):
            fix = "copy the head's token there (`ray get-auth-token`), or set RAY_AUTH_TOKEN_PATH"
            return Check("token", FATAL, f"RAY_AUTH_MODE=token, but {path} does not exist", fix)
        return Check("token", OK, "not needed: a local cluster creates a token")
    if path.stat().st_mode & 0o077:
        return Check(
            "token", WARNING, f"{path} is readable by other users", f"chmod 600 {path}, and create a new token"
        )
    return Check("token", OK, f"in {path}, readable only by this user")


def check_cpu() -> Check:
    """Check the instruction sets of the CPU, which decide the speed of bfloat16."""
    return cpu_check(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"), platform.machine())


def cpu_check(cpu_info: str, machine: str) -> Check:
    """Return the check for the contents of /proc/cpuinfo.

    The ratios are medians of decoding and of a train step of a small Llama on one core of an EPYC with AVX512_BF16:
    without limits, and with oneDNN and torch limited to AVX-512 without bfloat16 and to AVX2.
    """
    fields: dict[str, str] = {}
    for line in cpu_info.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name", machine)
    prefer = "prefer policy.precision=float32"
    state, fix = OK, ""
    if machine == "aarch64":
        is_native = "bf16" in flags
        means = "Arm with bfloat16" if is_native else f"Arm without bfloat16, which is emulated: {prefer}"
    elif flags & {"avx512_bf16", "amx_bf16"}:
        names = [name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512")) if flag in flags]
        means = f"{' and '.join(names)} with bfloat16, which takes about 0.6 times as long as float32"
    elif {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        means = f"AVX-512 without bfloat16, which is emulated and takes twice as long as float32: {prefer}"
    elif "avx_ne_convert" in flags:
        means = f"AVX2 that converts bfloat16 (AVX-NE-CONVERT), which was not benchmarked: {prefer}"
    elif "avx2" in flags:
        means = f"AVX2 only; bfloat16 is emulated, 3 (generation) to 15 (training) times as long as float32: {prefer}"
    elif flags:
        state, fix = (
            WARNING,
            "use policy.generation.backend=torch: vLLM needs AVX2; expect slow runs, or take another CPU",
        )
        means = "no AVX2"
    else:
        means = "instruction sets unknown"
    return Check("CPU", state, f"{model}: {means}", fix)


def check_gpu() -> Check:
    """Check the GPU driver, if there is one."""
    devices = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()]
    program = shutil.which("nvidia-smi")
    if program is None:
        if devices:
            fix = "install the driver's tools, or start the container with --gpus all"
            return Check("GPU", WARNING, f"{len(devices)} devices, but nvidia-smi is missing", fix)
        return Check("GPU", OK, "none; jobs run on CPUs (cluster.gpus_per_node=0)")
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return Check("GPU", WARNING, str(error), "check that `nvidia-smi` works")
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        found = (done.stderr or done.stdout).strip().partition("\n")[0] or f"nvidia-smi exits with {done.returncode}"
        return Check("GPU", WARNING, found, "reload the driver or restart the machine; jobs on CPUs still run")
    return Check("GPU", OK, f"{len(lines)} x {lines[0]}")


def check_home() -> Iterator[Check]:
    """Check that there is a home directory, the default location of models, uv's cache and Ray's token."""
    if settings.home_dir() is None:
        found = f"none; user id {os.getuid()} has no account, and HOME is not set"
        yield Check("home", WARNING, found, "set HOME to a writable directory (in containers: -e HOME=/tmp)")


def check_compiler() -> Check:
    """Check for a C compiler and Python headers, which Triton (used by vLLM on GPUs) needs at run time."""
    compiler = settings.snapshot().get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # like Triton, ignore Debian's scheme
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    missing = [part for part, ok in (("no C compiler", compiler), (f"no {header}", header.is_file())) if not ok]
    if not missing:
        return Check("compiler", OK, f"{compiler}, with Python's headers")
    if shutil.which("nvidia-smi") is None:
        return Check("compiler", OK, f"{', '.join(missing)}; needed only with GPUs")
    fix = "apt-get install gcc libc6-dev python3-dev, or set CC: vLLM needs them to start on a GPU"
    return Check("compiler", WARNING, ", ".join(missing), fix)


def check_disk() -> Iterator[Check]:
    """Check the free space for venvs, uv's cache, temporary files and Ray's session."""
    for purpose, path, name in (
        ("venvs", settings.venv_dir(), settings.VENV_DIR.name),
        ("uv's cache", settings.uv_cache_dir(), "UV_CACHE_DIR"),
        ("temporary files", Path(settings.snapshot().get("TMPDIR") or "/tmp"), "TMPDIR"),
    ):
        directory = _nearest(path)
        free = shutil.disk_usage(directory).free / _GB
        found = f"{path}: {free:.1f} GB free"
        if directory != path and os.path.lexists(path):
            found = f"{path} is not an accessible directory"
            state, fix = FATAL, f"set {name} to an accessible directory"
        elif not os.access(directory, os.W_OK) and purpose == "temporary files":
            state, fix = FATAL, f"set {name} to a writable directory"
        elif not os.access(directory, os.W_OK):
            state, fix = WARNING, f"only existing venvs can be used; to build venvs, set {name} to a writable directory"
        elif free < _MIN_FREE_GB:
            state, fix = FATAL, f"free space (nemo-rl venvs prune, uv cache prune), or set {name} to another disk"
        elif free < _GOOD_FREE_GB and purpose == "venvs":
            state, fix = WARNING, f"all venvs take about 20 GB: free space or set {name}"
        else:
            state, fix = OK, ""
        yield Check(f"disk: {purpose}", state, found, fix)


def check_shm() -> Check:
    """Check the size of /dev/shm, which Ray's object store and torch use."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Check("shared memory", WARNING, "no /dev/shm", "mount it (in containers: --shm-size=16g)")
    size = shutil.disk_usage(path).total / _GB
    if size < _MIN_SHM_GB:
        return Check("shared memory", WARNING, f"{size:.2f} GB", "start the container with --shm-size=16g")
    return Check("shared memory", OK, f"{size:.1f} GB")


def check_open_files() -> Check:
    """Check the limit on open files; Ray opens a connection per pair of processes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= _MIN_FILES or soft == resource.RLIM_INFINITY:
        return Check("open files", OK, str(soft))
    return Check("open files", WARNING, f"{soft} (hard limit {hard})", f"ulimit -n {max(_MIN_FILES, min(hard, 65536))}")


def check_ports() -> Check:
    """Check that the default ports of a Ray head are free."""
    used = []
    for port, service in _RAY_PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                used.append(f"{port} ({service})")
    if not used:
        return Check("ports", OK, "Ray's default ports are free")
    fix = (
        "none needed if this is your cluster. To start a second one here, pass other ports to `ray start`: --port, "
        "--dashboard-port, --dashboard-agent-listen-port, --ray-client-server-port"
    )
    return Check("ports", WARNING, f"in use: {', '.join(used)}", fix)


def check_clock() -> Check:
    """Compare this machine's clock with the file server's; locks, leases and certificates depend on it."""
    for path in (settings.venv_dir(), Path(settings.snapshot().get("TMPDIR") or "/tmp")):
        if path.is_dir() and os.access(path, os.W_OK):
            probe = path / f".clock-{os.getpid()}-{os.urandom(4).hex()}"
            probe.touch()
            offset = abs(probe.stat().st_mtime - time.time())
            probe.unlink()
            break
    else:
        return Check("clock", OK, time.strftime("%F %T %Z"))
    if offset > MAX_CLOCK_OFFSET_S:
        return Check(
            "clock", WARNING, f"differs by {offset:.0f} s from that of {path}", "synchronise clocks (NTP, chrony)"
        )
    return Check("clock", OK, f"{time.strftime('%F %T %Z')}; agrees with that of {path}")


def check_shared_filesystem() -> Check:
    """Check whether nodes share the file system of the venv directory, and whether locks work on it."""
    path = settings.venv_dir()
    directory = _nearest(path)
    mounts = [part for part in psutil.disk_partitions(all=True) if directory.is_relative_to(part.mountpoint)]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"
    shared = kind in _SHARED
    if shared:
        strategy = "shared by nodes: each venv is built once"
    elif settings.VENV_SPREAD.get() == "auto":
        strategy = "local: one node builds each venv and broadcasts it"
    else:
        strategy = "local: each node builds its venvs"
    found = f"{path} is on {kind}, {strategy}"
    if os.access(directory, os.W_OK):
        probe = directory / f".lock-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            with probe.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            fix = f"mount it with locks (flock, not nolock), or set {settings.VENV_DIR.name} to another directory"
            return Check("file system", FATAL, f"{found}; locks do not work: {error.strerror}", fix)
        finally:
            probe.unlink(missing_ok=True)
    return Check("file system", OK, found)


def check_locks() -> Check:
    """List build locks that are held. The kernel releases the locks of dead processes."""
    held = []
    for lock in sorted(Store.default().directory.glob("*.lock")):
        with contextlib.suppress(OSError), lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(f"{lock.name}: {file.read().strip() or 'holder unknown'}")
    if not held:
        return Check("build locks", OK, "none held")
    fix = "a build is running; if the process hangs, kill it to release the lock"
    return Check("build locks", WARNING, "; ".join(held), fix)
