"""Environment variables that nemo_rl reads: name, type, default and one line of help.

Only this module of the package reads `os.environ`. It reads a variable on each call of `get`, never at import, so tests
and jobs can change it at any time::

    from nemo_rl import settings
    settings.VENV_DIR.get()          # Path | None

The documentation's table of environment variables is generated from `ALL`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from nemo_rl.errors import ConfigError

T = TypeVar("T")

ALL: dict[str, Variable] = {}


@dataclass(frozen=True)
class Variable(Generic[T]):
    """Reads and parses one environment variable.

    Attributes:
        name: name in the environment.
        parse: converts the text to a value; raises `ValueError` with the reason if it is invalid.
        default: the value if the variable is unset or empty.
        help: one line for the documentation.
        alias: another name that is read if `name` is not set.

    Example::

        timeout = Variable("MY_TIMEOUT_S", float, 60.0, "Timeout in seconds.")
        timeout.get()                # 60.0
    """

    name: str
    parse: Callable[[str], T]
    default: T
    help: str
    alias: str | None = None

    def __post_init__(self) -> None:
        ALL[self.name] = self

    def get(self) -> T:
        """Read the variable now. Raises `ConfigError` if its value is invalid."""
        for name in filter(None, (self.name, self.alias)):
            text = os.environ.get(name, "")
            if text == "":
                continue
            try:
                return self.parse(text)
            except ValueError as error:
                raise ConfigError(f"{name}={text!r}: {error}. {self.help}") from None
        return self.default


def _flag(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected true or false")


def _positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value <= 0:
        raise ValueError("expected a positive integer")
    return value


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.strip().lower() not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return text.strip().lower()

    return parse


def _non_negative_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise ValueError("expected an integer of at least 0")
    return value


def _positive_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError("expected a positive number of seconds")
    return value


VENV_DIR = Variable[Path | None](
    "NEMO_RL_VENV_DIR", Path, None, "The directory of worker venvs. Default: venvs/ in the project root."
)
PROJECT_ROOT = Variable[Path | None](
    "NEMO_RL_PROJECT_ROOT",
    Path,
    None,
    "The project, whose lock file decides the packages of venvs. Default: the nearest directory upward from the "
    "working directory whose pyproject.toml has [project] or [tool.uv.workspace], else this package's source tree.",
)
TEMPLATE = Variable(
    "NEMO_RL_TEMPLATE",
    str,
    "",
    "Set by a warm session in its processes: the template that they start from. Do not set it.",
)
CACHE_DIR = Variable[Path | None](
    "NEMO_RL_CACHE_DIR", Path, None, "The directory of models that the project creates. Default: ~/.cache/nemo_rl."
)
FORCE_REBUILD_VENVS = Variable(
    "NRL_FORCE_REBUILD_VENVS", _flag, False, "Rebuild every venv once per job on every node, even if it is up to date."
)
COMPILE_BYTECODE = Variable(
    "NEMO_RL_COMPILE_BYTECODE", _flag, True, "Compile bytecode when a venv is built, which makes its first import fast."
)
VENV_LOCK_TIMEOUT_S = Variable(
    "NEMO_RL_VENV_LOCK_TIMEOUT_S",
    _positive_seconds,
    3600.0,
    "Seconds to wait for another process that builds the same venv.",
)
VENV_BUILD_TIMEOUT_S = Variable(
    "NEMO_RL_VENV_BUILD_TIMEOUT_S", _positive_seconds, 3600.0, "Seconds that one call of uv may take."
)
VENV_SPREAD = Variable(
    "NEMO_RL_VENV_SPREAD",
    _one_of("auto", "off"),
    "auto",
    "auto: if nodes have separate venv directories, one node builds a venv and sends it to the others. off: every such "
    "node builds it.",
)
SOURCE_SPREAD = Variable(
    "NEMO_RL_SOURCE_SPREAD",
    _one_of("auto", "off"),
    "auto",
    "auto: nodes that lack the driver's source receive it, see many-nodes.md. off: every node must already have it.",
)
SOURCE_MAX_MB = Variable(
    "NEMO_RL_SOURCE_MAX_MB",
    _positive_int,
    100,
    "The largest source, in MB before compression, that is sent to nodes.",
)
SOURCES = Variable[str | None](
    "NEMO_RL_SOURCES",
    str,
    None,
    "Projects whose path here differs from the path that plans and venvs name, as JSON (named path -> path here); set "
    "by the driver for nodes that received its source, and by `nemo-rl submit`.",
)
CONTAINER = Variable(
    "NEMO_RL_CONTAINER",
    _flag,
    False,
    "The image of this process contains the venvs; set by docker/Dockerfile.",
    alias="NRL_CONTAINER",
)
VENV_DRIFT = Variable[str | None](
    "NEMO_RL_VENV_DRIFT",
    _one_of("rebuild", "refuse", "ignore"),
    None,
    "If the code asks for other packages than a venv holds: rebuild it, refuse to start, or ignore the difference. "
    "Default: refuse if NEMO_RL_CONTAINER is set, else rebuild.",
)
IGNORE_VERSION_MISMATCH = Variable(
    "NRL_IGNORE_VERSION_MISMATCH", _flag, False, "The same as NEMO_RL_VENV_DRIFT=ignore, if that one is not set."
)
BUILD_VARIABLES = Variable[str | None](
    "NEMO_RL_BUILD_VARIABLES",
    str,
    None,
    "Names of variables that builds of source packages receive, such as `MAX_JOBS,NVTE_*`, in addition to those that "
    "the project names, see venvs.md.",
)
BUNDLE = Variable[Path | None](
    "NEMO_RL_BUNDLE", Path, None, "An unpacked bundle to build venvs from; set by `nemo-rl venvs build --from-bundle`."
)
UV = Variable[str | None]("NEMO_RL_UV", str, None, "Path of the uv executable. Default: the one on PATH.")
PY_EXECUTABLES_SYSTEM = Variable(
    "NEMO_RL_PY_EXECUTABLES_SYSTEM",
    _flag,
    False,
    "Run every worker with the driver's Python, for images that contain all packages.",
)
VIRTUAL_CLUSTER_MAX_RETRIES = Variable(
    "NRL_VIRTUAL_CLUSTER_MAX_RETRIES",
    _positive_int,
    6,
    "Number of attempts to reserve the resources of a cluster.",
)
WORKER_START_TIMEOUT_S = Variable(
    "NEMO_RL_WORKER_START_TIMEOUT_S",
    _positive_seconds,
    1800.0,
    "Seconds from the creation of a worker group until its last worker must be ready.",
)
KEEP_STAGE_WORKERS = Variable(
    "NEMO_RL_KEEP_STAGE_WORKERS",
    _non_negative_int,
    16,
    "Number of idle workers of pipeline stages that a driver keeps for its next run of the same stage, see "
    "pipelines.md. 0: none.",
)
KEEP_STAGE_WORKERS_S = Variable(
    "NEMO_RL_KEEP_STAGE_WORKERS_S",
    _positive_seconds,
    120.0,
    "Seconds without work after which a kept worker of a pipeline stage ends.",
)
TRACEBACK = Variable(
    "NEMO_RL_TRACEBACK", _flag, False, "Print a full traceback if a command fails, instead of the message only."
)
PROGRESS = Variable(
    "NEMO_RL_PROGRESS",
    _one_of("auto", "plain", "off"),
    "auto",
    "How a session shows venv builds, starts of worker groups, uploads and pipelines on standard error. auto: a live "
    "table on a terminal, one line per phase elsewhere, nothing under pytest or where logging shows the same lines. "
    "plain: lines, on a terminal and under pytest too. off: nothing. Workers never show any.",
)
RAY_ADDRESS = Variable[str | None](
    "RAY_ADDRESS",
    str,
    None,
    "Address of a running Ray cluster to join; `local` starts a new cluster that no other job joins.",
)
RAY_API_SERVER_ADDRESS = Variable[str | None](
    "RAY_API_SERVER_ADDRESS",
    str,
    None,
    "Address of Ray's job server for `nemo-rl submit` and related commands. Default: http://127.0.0.1:8265.",
)
RAY_DASHBOARD = Variable(
    "NEMO_RL_RAY_DASHBOARD", _flag, False, "Start Ray's dashboard with a local cluster; this takes seconds."
)
CUDA_VISIBLE_DEVICES = Variable[str | None](
    "CUDA_VISIBLE_DEVICES", str, None, "The GPUs that a local Ray cluster may use."
)
RANK = Variable("RANK", _non_negative_int, 0, "This worker's index in its group; set for every worker.")
LOCAL_RANK = Variable("LOCAL_RANK", _non_negative_int, 0, "This worker's index on its node; set for every worker.")
WORLD_SIZE = Variable("WORLD_SIZE", _positive_int, 1, "Number of workers in the group; set for every worker.")
MASTER_ADDR = Variable[str | None]("MASTER_ADDR", str, None, "Address of rank 0 of the group; set for every worker.")
MASTER_PORT = Variable[int | None](
    "MASTER_PORT", _positive_int, None, "Port on which rank 0 of the group listens; set for every worker."
)
VLLM_API_KEY = Variable[str | None](
    "VLLM_API_KEY",
    str,
    None,
    "Token of the HTTP servers that vLLM workers start with `http_port`. Default: each generates one.",
)

# Variables that are forwarded from the driver to its workers. No others are.
FORWARDED_PREFIXES: tuple[str, ...] = (
    "NEMO_RL_",
    "NRL_",
    "HF_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "TORCH",
    "PYTORCH_",
    "NCCL_",
    "GLOO_",
    "UCX_",
    "VLLM_",
    "OMP_",
    "GOMP_",
    "ONEDNN_",
    "KMP_",
    "MKL_",
    "WANDB_",
    "MLFLOW_",
)
FORWARDED_NAMES: frozenset[str] = frozenset(
    {
        *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
        *("LANG", "LD_LIBRARY_PATH", "LRU_CACHE_CAPACITY", "TZ"),
    }
)
# Other variables that the processes of a local Ray cluster inherit.
INHERITED_PREFIXES: tuple[str, ...] = ("RAY_", "CUDA_", "NVIDIA_", "LC_", "PYTHON", "LD_", "SSL_CERT_", "XDG_")
INHERITED_NAMES: frozenset[str] = frozenset(
    {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TERM", "VIRTUAL_ENV", "GLIBC_TUNABLES"}
)
# Complete words between underscores: HF_TOKEN is a secret, TOKENIZERS_PARALLELISM and MAX_TOKENS are not.
_SECRET_WORDS = frozenset(
    {"TOKEN", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "APIKEY", "CREDENTIAL", "CREDENTIALS", "PRIVATE"}
)
_SECRET_KEYS = frozenset({"API", "ACCESS", "AUTH", "SIGNING", "ENCRYPTION", "SSH"})  # before the word KEY
MASK = "********"


def forwarded() -> dict[str, str]:
    """Return the variables that workers receive: this process's with a documented prefix or name.

    `NEMO_RL_PROGRESS` is always `off`: only the driver shows progress.
    """
    variables = {
        name: value
        for name, value in os.environ.items()
        if name in FORWARDED_NAMES or name.startswith(FORWARDED_PREFIXES)
    }
    return {**variables, PROGRESS.name: "off"}


def is_secret(name: str) -> bool:
    """Return whether the value of a variable with this name must not be shown.

    Example:
        >>> is_secret("HF_TOKEN"), is_secret("VLLM_MAX_TOKENS")
        (True, False)
    """
    words = name.upper().split("_")
    return not _SECRET_WORDS.isdisjoint(words) or any(
        first in _SECRET_KEYS and second in ("KEY", "KEYS") for first, second in itertools.pairwise(words)
    )


def masked(variables: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of `variables` for logs, with `MASK` as the value of each secret."""
    return {name: MASK if is_secret(name) else value for name, value in variables.items()}


@contextlib.contextmanager
def only_inheritable() -> Iterator[None]:
    """Remove the variables that processes of a local Ray cluster must not inherit, while the block runs.

    The forwarded variables stay, and those that programs need. A worker inherits the environment of its raylet, so any
    other variable of the driver would reach every worker.
    """
    hidden = {
        name: value
        for name, value in os.environ.items()
        if name not in INHERITED_NAMES and not name.startswith(INHERITED_PREFIXES) and name not in forwarded()
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def snapshot() -> dict[str, str]:
    """Return a copy of this process's environment, from which to derive the environment of a child process."""
    return dict(os.environ)


def take(name: str) -> str | None:
    """Remove a variable from this process's environment and return its value, or None."""
    return os.environ.pop(name, None)


def export(variables: Mapping[str, str]) -> None:
    """Set variables of this process. For entry points, and for a worker before it imports its packages."""
    os.environ.update(variables)


@contextlib.contextmanager
def exported(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process while the block runs, and restore the previous values after it."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def is_under_pytest() -> bool:
    """Return whether pytest runs this process, or started it."""
    return "PYTEST_VERSION" in os.environ


def venv_drift() -> str:
    """Return the policy for a venv with other packages than the code asks for: `rebuild`, `refuse` or `ignore`."""
    default = "refuse" if CONTAINER.get() else "rebuild"
    return VENV_DRIFT.get() or ("ignore" if IGNORE_VERSION_MISMATCH.get() else default)


def project_root() -> Path:
    """Return the directory of the project, which `PY_EXECUTABLES` and the default venv directory belong to.

    It is `NEMO_RL_PROJECT_ROOT` if set, else the nearest directory upward from the working directory whose
    `pyproject.toml` has `[project]` or `[tool.uv.workspace]` (as for uv), else the source tree that this package is
    imported from. If the project is a member of a workspace, its `uv.lock` is in the workspace's root.

    Raises:
        ConfigError: there is none of these. The message names the variable.
    """
    if (root := PROJECT_ROOT.get()) is not None:
        return root.resolve()
    try:
        directory = Path.cwd()
    except FileNotFoundError:  # the working directory was removed
        directory = Path("/")
    source_tree = Path(__file__).resolve().parent.parent
    for candidate in (directory, *directory.parents, source_tree):
        if _is_project(candidate / "pyproject.toml"):
            return candidate.resolve()
    raise ConfigError(
        f"there is no project: neither {directory} nor a directory above it has a pyproject.toml with [project]. "
        f"Change to your project, create one with `nemo-rl init`, or set {PROJECT_ROOT.name} to its directory"
    )


def project_variables() -> dict[str, str]:
    """Return the variable that makes another process use this process's project; empty if there is none."""
    try:
        return {PROJECT_ROOT.name: str(project_root())}
    except ConfigError:
        return {}


def _is_project(path: Path) -> bool:
    """Return whether a `pyproject.toml` describes a project. An unreadable one does: its error is reported later."""
    try:
        status = path.stat()
    except OSError:
        return False
    return _has_project_table(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _has_project_table(path: Path, modified_ns: int, size: int) -> bool:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    uv = content.get("tool", {}).get("uv", {})
    return "project" in content or (isinstance(uv, dict) and "workspace" in uv)


def venv_dir() -> Path:
    """Return the directory of worker venvs, which may not exist yet."""
    return (VENV_DIR.get() or project_root() / "venvs").absolute()


def home_dir() -> Path | None:
    """Return the user's home directory; None without HOME for a user id without an account, as in containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def cache_dir() -> Path:
    """Return the directory for files that the project creates once, such as the embedded model.

    Raises `ConfigError` if there is no home directory and the variable is not set.
    """
    if (directory := CACHE_DIR.get()) is not None:
        return directory.absolute()
    if (home := home_dir()) is None:
        raise ConfigError(
            f"there is no home directory: user id {os.getuid()} has no account, and HOME is not set. Set HOME to a "
            f"writable directory, or set {CACHE_DIR.name} ({CACHE_DIR.help})"
        )
    return home / ".cache" / "nemo_rl"


def uv_cache_dir() -> Path:
    """Return the directory of uv's cache."""
    home = home_dir()
    default = home / ".cache" / "uv" if home is not None else Path(".uv_cache")
    xdg_cache = os.environ.get("XDG_CACHE_HOME")
    return Path(os.environ.get("UV_CACHE_DIR") or (os.path.join(xdg_cache, "uv") if xdg_cache else default)).absolute()
