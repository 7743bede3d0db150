"""Every environment variable that nemo_rl reads: name, type, default, one line of help.

This module is the only reader of `os.environ` in the package. A variable is read when it is asked for, never at
import, so a test or a job can change it at any time::

    from nemo_rl import settings
    settings.VENV_DIR.get()          # Path | None

The documentation's table of environment variables is generated from `ALL`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from nemo_rl.errors import ConfigError

T = TypeVar("T")

ALL: dict[str, Variable] = {}


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable.

    Attributes:
        name: as it stands in the environment.
        parse: turns the text into a value; raises `ValueError` with the reason when it cannot.
        default: the value when the variable is unset or empty.
        help: one line for the documentation.
    """

    name: str
    parse: Callable[[str], T]
    default: T
    help: str

    def __post_init__(self) -> None:
        ALL[self.name] = self

    def get(self) -> T:
        """Read the variable now. Raises `ConfigError` when its value cannot be parsed."""
        text = os.environ.get(self.name, "")
        if text == "":
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ConfigError(f"{self.name}={text!r}: {error}. {self.help}") from None


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
    "NEMO_RL_VENV_DIR", Path, None, "Where worker venvs are kept. Default: venvs/ in the project root."
)
PROJECT_ROOT = Variable[Path | None](
    "NEMO_RL_PROJECT_ROOT",
    Path,
    None,
    "The directory with pyproject.toml and uv.lock. Default: the source tree this package is imported from.",
)
CACHE_DIR = Variable[Path | None](
    "NEMO_RL_CACHE_DIR", Path, None, "Where models that the project makes are kept. Default: ~/.cache/nemo_rl."
)
FORCE_REBUILD_VENVS = Variable(
    "NRL_FORCE_REBUILD_VENVS", _flag, False, "Rebuild every venv once per job on every node, whatever its digest says."
)
COMPILE_BYTECODE = Variable(
    "NEMO_RL_COMPILE_BYTECODE", _flag, True, "Compile bytecode when a venv is built, so that its first import is fast."
)
VENV_LOCK_TIMEOUT_S = Variable(
    "NEMO_RL_VENV_LOCK_TIMEOUT_S",
    _positive_seconds,
    3600.0,
    "How long to wait, in seconds, for another process that builds the same venv.",
)
VENV_BUILD_TIMEOUT_S = Variable(
    "NEMO_RL_VENV_BUILD_TIMEOUT_S", _positive_seconds, 3600.0, "How long one call of uv may take, in seconds."
)
VENV_SPREAD = Variable(
    "NEMO_RL_VENV_SPREAD",
    _one_of("auto", "off"),
    "auto",
    "auto: where nodes have venv directories of their own, one node builds a venv and the others get it from node to "
    "node. off: every such node builds for itself.",
)
SOURCE_SPREAD = Variable(
    "NEMO_RL_SOURCE_SPREAD",
    _one_of("auto", "off"),
    "auto",
    "auto: nodes that do not have the driver's source get it, see many-nodes.md. off: every node has to have it.",
)
SOURCE_MAX_MB = Variable(
    "NEMO_RL_SOURCE_MAX_MB",
    _positive_int,
    100,
    "The largest source, in MB before compression, that is sent to nodes that do not have it.",
)
SOURCES = Variable[str | None](
    "NEMO_RL_SOURCES",
    str,
    None,
    "Where projects are that were sent to a node, as JSON (path in the driver -> path here); set by the driver.",
)
CONTAINER = Variable(
    "NEMO_RL_CONTAINER", _flag, False, "This is an image with the venvs inside; set by docker/Dockerfile."
)
VENV_DRIFT = Variable[str | None](
    "NEMO_RL_VENV_DRIFT",
    _one_of("rebuild", "refuse", "ignore"),
    None,
    "When the code asks for other packages than a venv holds: rebuild it, refuse to start, or ignore the difference. "
    "Default: refuse where NEMO_RL_CONTAINER is set, else rebuild.",
)
UV = Variable[str | None]("NEMO_RL_UV", str, None, "Path of the uv executable. Default: the one on PATH.")
PY_EXECUTABLES_SYSTEM = Variable(
    "NEMO_RL_PY_EXECUTABLES_SYSTEM",
    _flag,
    False,
    "Run every worker with the driver's own Python: for images that already hold all packages.",
)
VIRTUAL_CLUSTER_MAX_RETRIES = Variable(
    "NRL_VIRTUAL_CLUSTER_MAX_RETRIES",
    _positive_int,
    6,
    "How often to try to reserve a cluster's resources before giving up.",
)
WORKER_START_TIMEOUT_S = Variable(
    "NEMO_RL_WORKER_START_TIMEOUT_S",
    _positive_seconds,
    1800.0,
    "How long a worker group may take from its creation to its last worker being ready, in seconds.",
)
TRACEBACK = Variable(
    "NEMO_RL_TRACEBACK", _flag, False, "Let the command line end with a full traceback instead of one sentence."
)
RAY_ADDRESS = Variable[str | None](
    "RAY_ADDRESS",
    str,
    None,
    "Address of a running Ray cluster to join; `local` always starts a new one that nobody else joins.",
)
RAY_API_SERVER_ADDRESS = Variable[str | None](
    "RAY_API_SERVER_ADDRESS",
    str,
    None,
    "Where `nemo-rl submit` and its kin find Ray's job server. Default: http://127.0.0.1:8265.",
)
RAY_DASHBOARD = Variable(
    "NEMO_RL_RAY_DASHBOARD", _flag, False, "Start Ray's dashboard with a local cluster; it adds seconds to the start."
)
CUDA_VISIBLE_DEVICES = Variable[str | None](
    "CUDA_VISIBLE_DEVICES", str, None, "Which GPUs a local Ray cluster may use."
)
RANK = Variable("RANK", _non_negative_int, 0, "This worker's index among its group's; set for every worker.")
LOCAL_RANK = Variable("LOCAL_RANK", _non_negative_int, 0, "This worker's index on its node; set for every worker.")
WORLD_SIZE = Variable("WORLD_SIZE", _positive_int, 1, "Number of workers in the group; set for every worker.")
MASTER_ADDR = Variable[str | None]("MASTER_ADDR", str, None, "Where rank 0 of the group listens; set for every worker.")
MASTER_PORT = Variable[int | None](
    "MASTER_PORT", _positive_int, None, "Port at which rank 0 of the group listens; set for every worker."
)

# Variables of the driver that reach its workers. Nothing else of the driver's environment does.
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
    "KMP_",
    "MKL_",
    "WANDB_",
    "MLFLOW_",
)
FORWARDED_NAMES: frozenset[str] = frozenset(
    {"LD_LIBRARY_PATH", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "TZ", "LANG"}
)
# Whole words between underscores: HF_TOKEN is a secret, TOKENIZERS_PARALLELISM and MAX_TOKENS are not.
# What the processes of a local Ray cluster inherit besides.
INHERITED_PREFIXES: tuple[str, ...] = ("RAY_", "CUDA_", "NVIDIA_", "LC_", "PYTHON", "LD_", "SSL_CERT_", "XDG_")
INHERITED_NAMES: frozenset[str] = frozenset(
    {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "TERM", "VIRTUAL_ENV", "GLIBC_TUNABLES"}
)
_SECRET_WORDS = frozenset(
    {"TOKEN", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "APIKEY", "CREDENTIAL", "CREDENTIALS", "PRIVATE"}
)
_SECRET_KEYS = frozenset({"API", "ACCESS", "AUTH", "SIGNING", "ENCRYPTION", "SSH"})  # before the word KEY
MASK = "********"


def forwarded() -> dict[str, str]:
    """The driver's variables that workers receive: those with a documented prefix or name, as they are now."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in FORWARDED_NAMES or name.startswith(FORWARDED_PREFIXES)
    }


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value must not be shown."""
    words = name.upper().split("_")
    return not _SECRET_WORDS.isdisjoint(words) or any(
        first in _SECRET_KEYS and second in ("KEY", "KEYS") for first, second in itertools.pairwise(words)
    )


def masked(variables: Mapping[str, str]) -> dict[str, str]:
    """A copy of `variables` that may be logged: values of names that look secret are replaced by `MASK`."""
    return {name: MASK if is_secret(name) else value for name, value in variables.items()}


@contextlib.contextmanager
def only_inheritable() -> Iterator[None]:
    """Within the block, this process has only variables that the processes of a local Ray cluster may inherit.

    Those are the forwarded ones and what programs need to run at all: a worker inherits its raylet's environment, so
    anything else that the driver has would reach every worker.
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
    """A copy of this process's whole environment, for building a child's."""
    return dict(os.environ)


def export(variables: Mapping[str, str]) -> None:
    """Set variables of this very process: for entry points, and for a worker before it imports its stack."""
    os.environ.update(variables)


@contextlib.contextmanager
def exported(variables: Mapping[str, str]) -> Iterator[None]:
    """Have these variables in this process while the block runs: for a process that serves others afterwards."""
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


def venv_drift() -> str:
    """What to do about a venv whose packages are not what the code asks for: `rebuild`, `refuse` or `ignore`."""
    return VENV_DRIFT.get() or ("refuse" if CONTAINER.get() else "rebuild")


def project_root() -> Path:
    """The directory that holds the project's `pyproject.toml` and `uv.lock`."""
    return (PROJECT_ROOT.get() or Path(__file__).resolve().parent.parent).resolve()


def venv_dir() -> Path:
    """The directory that holds worker venvs (it may not exist yet)."""
    return (VENV_DIR.get() or project_root() / "venvs").absolute()


def home_dir() -> Path | None:
    """The user's home directory; None for a user id that no account has (as in containers) without HOME."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def cache_dir() -> Path:
    """The directory for things the project makes once and keeps, such as the embedded model. Raises `ConfigError`."""
    if (directory := CACHE_DIR.get()) is not None:
        return directory.absolute()
    if (home := home_dir()) is None:
        raise ConfigError(
            f"there is no home directory: user id {os.getuid()} has no account, and HOME is not set. Set HOME to a "
            f"directory that can be written, or {CACHE_DIR.name} ({CACHE_DIR.help})"
        )
    return home / ".cache" / "nemo_rl"


def uv_cache_dir() -> Path:
    """Where uv keeps what it has downloaded."""
    home = home_dir()
    default = home / ".cache" / "uv" if home is not None else Path(".uv_cache")
    of_xdg = os.environ.get("XDG_CACHE_HOME")
    return Path(os.environ.get("UV_CACHE_DIR") or (os.path.join(of_xdg, "uv") if of_xdg else default)).absolute()
