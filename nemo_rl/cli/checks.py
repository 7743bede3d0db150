"""What `nemo-rl doctor` looks at on one machine: each check is a function that returns one `Check`."""

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
_MIN_FREE_GB, _GOOD_FREE_GB = 2, 40  # a venv with torch and CUDA takes 5 GB, all of them about 20
_MIN_SHM_GB = 1
_MIN_FILES = 4096
MAX_CLOCK_OFFSET_S = 5.0
# Ray's own, where a head on this machine would listen: GCS, client server, dashboard, agent.
_RAY_PORTS = {6379: "GCS", 10001: "client server", 8265: "dashboard and job server", 52365: "agent"}
_SHARED = ("nfs", "nfs4", "lustre", "gpfs", "cephfs", "beegfs", "fuse.juicefs", "wekafs", "9p", "cifs", "smb3", "afs")


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        state: `ok`; `warning` for what may hurt; `fatal` for what would stop a run.
        found: what is there.
        fix: what to do; empty when `ok`.
    """

    name: str
    state: str
    found: str
    fix: str = ""


def run_checks() -> list[Check]:
    """All checks of this machine, in a fixed order. Probe files are removed again; nothing else is written."""
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
    found: list[Check] = []
    for check in checks:
        try:
            result = check()
            found.extend([result] if isinstance(result, Check) else result)
        except OSError as error:  # one thing that cannot be looked at must not hide all others
            name = check.__name__.removeprefix("check_").replace("_", " ")
            found.append(Check(name, WARNING, f"cannot be looked at: {error}", "see whether that path can be used"))
    return found


def _nearest(path: Path) -> Path:
    """The deepest directory above or at `path` that is there, as far as this user may see."""

    def is_there(candidate: Path) -> bool:
        try:
            return candidate.is_dir()
        except PermissionError:
            return False

    return next(filter(is_there, (path, *path.parents)), Path("/"))


def check_python() -> Check:
    """The driver's own Python, and whether the platform has packages at all."""
    version, machine = platform.python_version(), platform.machine()
    found = f"{version} at {sys.executable}, {platform.system()} {machine}"
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        return Check("Python", FATAL, found, "use Python 3.11, 3.12 or 3.13: uv venv --python 3.11")
    if platform.system() != "Linux" or machine not in ("x86_64", "aarch64"):
        return Check("Python", FATAL, found, "run on Linux, x86_64 or aarch64: ray has no wheels for others")
    return Check("Python", OK, found)


def check_uv() -> Check:
    """uv starts."""
    from nemo_rl.venvs.uv import find_uv

    try:
        path = find_uv()
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (NemoRLError, OSError, subprocess.SubprocessError) as error:
        return Check("uv", FATAL, str(error), f"pip install uv, or set {settings.UV.name}")
    return Check("uv", OK, f"{done.stdout.strip()} at {path}")


def check_project() -> Check:
    """The lock is there and matches pyproject.toml."""
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
    """ray is installed, and the cluster that RAY_ADDRESS names can be reached."""
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
    fix = "start it (`ray start --head`), correct RAY_ADDRESS, or unset it to run on this machine alone"
    return Check("Ray", FATAL, f"{version}; nobody answers at RAY_ADDRESS={address}", fix)


def check_token() -> Check:
    """Whoever knows the token of a Ray cluster runs code on it; without one, whoever reaches its ports does."""
    variables, address = settings.snapshot(), settings.RAY_ADDRESS.get()
    if variables.get("RAY_AUTH_TOKEN"):
        return Check("token", OK, "in RAY_AUTH_TOKEN")
    home = settings.home_dir() or Path("/")
    path = Path(variables.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    if not path.is_file():
        if variables.get("RAY_AUTH_MODE") == "token" and address not in (None, "local"):
            fix = "copy the head's token there (`ray get-auth-token`), or set RAY_AUTH_TOKEN_PATH"
            return Check("token", FATAL, f"RAY_AUTH_MODE=token, and no file {path}", fix)
        return Check("token", OK, "none needed: a local cluster makes its own")
    if path.stat().st_mode & 0o077:
        return Check("token", WARNING, f"others may read {path}", f"chmod 600 {path}, and make a new one")
    return Check("token", OK, f"in {path}, which nobody else may read")


def check_cpu() -> Check:
    """Which instruction sets torch and vLLM find, and what that means for bfloat16 on the CPU."""
    return cpu_check(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"), platform.machine())


def cpu_check(cpu_info: str, machine: str) -> Check:
    """The finding for the contents of /proc/cpuinfo.

    The times are medians of decoding and of a train step of a small Llama on one core of an EPYC with AVX512_BF16, by
    itself and with oneDNN and torch held to AVX-512 without bfloat16 and to AVX2.
    """
    fields: dict[str, str] = {}
    for line in cpu_info.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name", machine)
    prefer = "prefer policy.precision=float32 on it"
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
        means = f"AVX2 that converts bfloat16; it was not measured: {prefer}"
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
    """The GPU driver, where there is one."""
    devices = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()]
    program = shutil.which("nvidia-smi")
    if program is None:
        if devices:
            fix = "install the driver's tools, or start the container with --gpus all"
            return Check("GPU", WARNING, f"{len(devices)} devices but no nvidia-smi", fix)
        return Check("GPU", OK, "none: jobs run on CPUs (cluster.gpus_per_node=0)")
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return Check("GPU", WARNING, str(error), "see whether `nvidia-smi` works")
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        found = (done.stderr or done.stdout).strip().partition("\n")[0] or f"nvidia-smi ends with {done.returncode}"
        return Check("GPU", WARNING, found, "reload the driver, or restart the machine; jobs on CPUs still run")
    return Check("GPU", OK, f"{len(lines)} x {lines[0]}")


def check_home() -> Iterator[Check]:
    """Models, uv's cache and Ray's token are kept in the home directory by default. No finding where there is one."""
    if settings.home_dir() is None:
        found = f"none: user id {os.getuid()} has no account, and HOME is not set"
        yield Check("home", WARNING, found, "set HOME to a directory to write in (containers take -e HOME=/tmp)")


def check_compiler() -> Check:
    """What Triton, which vLLM uses on GPUs, compiles a small module with where it runs."""
    compiler = settings.snapshot().get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own, which Triton does not follow either
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    lacks = [what for what, there in (("no C compiler", compiler), (f"no {header}", header.is_file())) if not there]
    if not lacks:
        return Check("compiler", OK, f"{compiler}, with Python's headers")
    if shutil.which("nvidia-smi") is None:
        return Check("compiler", OK, f"{', '.join(lacks)}; only GPUs need it")
    fix = "apt-get install gcc libc6-dev python3-dev (or set CC): vLLM does not start on a GPU without"
    return Check("compiler", WARNING, ", ".join(lacks), fix)


def check_disk() -> Iterator[Check]:
    """Space where venvs, uv's cache, temporary files and Ray's session are."""
    for what, path, name in (
        ("venvs", settings.venv_dir(), settings.VENV_DIR.name),
        ("uv's cache", settings.uv_cache_dir(), "UV_CACHE_DIR"),
        ("temporary files", Path(settings.snapshot().get("TMPDIR") or "/tmp"), "TMPDIR"),
    ):
        there = _nearest(path)
        free = shutil.disk_usage(there).free / _GB
        found = f"{path}: {free:.1f} GB free"
        if there != path and os.path.lexists(path):
            state, fix, found = FATAL, f"set {name} to a directory that can be entered", f"{path} is none, or is closed"
        elif not os.access(there, os.W_OK) and what == "temporary files":
            state, fix = FATAL, f"set {name} to a directory to write in"
        elif not os.access(there, os.W_OK):
            state, fix = WARNING, f"only venvs that are ready can be used; else set {name} to a directory to write in"
        elif free < _MIN_FREE_GB:
            state, fix = FATAL, f"free space (nemo-rl venvs prune, uv cache prune), or set {name} to another disk"
        elif free < _GOOD_FREE_GB and what == "venvs":
            state, fix = WARNING, f"all venvs together take about 20 GB: free space or set {name}"
        else:
            state, fix = OK, ""
        yield Check(f"disk: {what}", state, found, fix)


def check_shm() -> Check:
    """Ray's object store and torch's workers live in /dev/shm."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Check("shared memory", WARNING, "no /dev/shm", "mount it: containers take --shm-size=16g")
    size = shutil.disk_usage(path).total / _GB
    if size < _MIN_SHM_GB:
        return Check("shared memory", WARNING, f"{size:.2f} GB", "start the container with --shm-size=16g")
    return Check("shared memory", OK, f"{size:.1f} GB")


def check_open_files() -> Check:
    """Ray opens a connection per process pair."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= _MIN_FILES or soft == resource.RLIM_INFINITY:
        return Check("open files", OK, str(soft))
    return Check("open files", WARNING, f"{soft} (hard limit {hard})", f"ulimit -n {max(_MIN_FILES, min(hard, 65536))}")


def check_ports() -> Check:
    """The ports of a Ray head that would be started here."""
    taken = []
    for port, what in _RAY_PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                taken.append(f"{port} ({what})")
    if not taken:
        return Check("ports", OK, "Ray's default ports are free")
    fix = (
        "if that is your cluster, fine. For a second one on this machine give other ports to `ray start`: --port, "
        "--dashboard-port, --dashboard-agent-listen-port, --ray-client-server-port"
    )
    return Check("ports", WARNING, f"in use: {', '.join(taken)}", fix)


def check_clock() -> Check:
    """This machine's clock against that of the disk's server: locks, leases and certificates go by it."""
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
        return Check("clock", WARNING, f"{offset:.0f} s away from that of {path}", "synchronise clocks (NTP, chrony)")
    return Check("clock", OK, f"{time.strftime('%F %T %Z')}; agrees with that of {path}")


def check_shared_filesystem() -> Check:
    """Whether the venv directory is on a file system that nodes share, and whether locks work there."""
    path = settings.venv_dir()
    there = _nearest(path)
    mounts = [part for part in psutil.disk_partitions(all=True) if there.is_relative_to(part.mountpoint)]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"
    shared = kind in _SHARED
    is_given = settings.VENV_SPREAD.get() == "auto"
    apart = "local: nodes give venvs to one another" if is_given else "local: each node builds"
    found = f"{path} is on {kind}, " + ("which nodes share: each venv is built once" if shared else apart)
    if os.access(there, os.W_OK):
        probe = there / f".lock-{os.getpid()}-{os.urandom(4).hex()}"
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
    """Build locks that are held now. One of a dead process cannot be: the kernel lets go of it."""
    held = []
    for lock in sorted(Store.default().directory.glob("*.lock")):
        with contextlib.suppress(OSError), lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(f"{lock.name}: {file.read().strip() or 'holder unknown'}")
    if not held:
        return Check("build locks", OK, "none held")
    fix = "a build is running; if that process hangs, end it: its lock ends with it"
    return Check("build locks", WARNING, "; ".join(held), fix)
