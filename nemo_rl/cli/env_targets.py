"""Environments of the command line, with their Python and problems.

They run in a child process here, in the venv of their workers, also if a job runs them in the workers themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rl import settings
from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.data.config import DataConfig
from nemo_rl.data.datasets import open_dataset
from nemo_rl.data.problem import ProblemDataset
from nemo_rl.distributed.workers.runtime_env_fields import named_spec, ray_chooses_python
from nemo_rl.environments.config import EnvironmentEntry
from nemo_rl.environments.episode_check import problem_record
from nemo_rl.environments.episode_process import EpisodeProcess
from nemo_rl.environments.registry import (
    declared_config,
    entry_fqn,
    environment_fqn,
    python_fields,
    registered_environments,
)
from nemo_rl.errors import ConfigError, EnvironmentFailure, NemoRLError
from nemo_rl.jobs.command_line import config_path
from nemo_rl.jobs.roles import plan_python
from nemo_rl.utils.config import ConfigModel, load_config
from nemo_rl.utils.names import suggest_or_list
from nemo_rl.venvs import DriverVersions, Progress, Spec, ensure


@dataclass(frozen=True)
class EnvironmentTarget:
    """Describes an environment that a command runs.

    Attributes:
        name: As given: its name in the section `env`, its registered name, or `package.module.name`.
        entry: Its settings.
        fqn: `package.module.name` of its class or function.
        data: The section `data` of the job.
        source: Where its name comes from.
    """

    name: str
    entry: EnvironmentEntry
    fqn: str
    data: DataConfig
    source: str

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"env.{self.name}" if self.source == "configuration" else self.name

    @property
    def expected(self) -> DriverVersions | None:
        """The versions that its Python must have; None for those of this process."""
        return DriverVersions.any() if self.entry.own_process else None

    def spec(self) -> Spec:
        """Return what its venv holds. Raises `ConfigError` or `RuntimeEnvError` if Ray would create its Python."""
        entry = self.entry
        fields = python_fields(
            self.label, self.fqn, entry.py_executable, entry.runtime_env, own_process=entry.own_process
        )
        if ray_chooses_python(fields):
            raise ConfigError(
                f"runtime_env of {self.label} has {', '.join(fields)}: Ray creates this Python when a job starts, so "
                "it cannot be used here. Use pip, uv or py_executable instead"
            )
        return named_spec(self.fqn, fields)[1]

    def problems(self) -> ProblemDataset:
        """Open its training problems. Raises `ConfigError` or `DataError`."""
        config = self.data.train if self.entry.data is None else self.entry.data.train
        return open_dataset(config, self.data, "train")


def find_environment(name: str, config: str | None, overrides: Sequence[str]) -> EnvironmentTarget:
    """Find an environment by its name.

    Args:
        config: A file, or the name of a recipe, whose section `env` has the name. Without one, the name is a registered
            one or `package.module.name`.
        overrides: `section.key=value` for the configuration; without one, `key=value` for the environment.

    Raises:
        ConfigError: The name is unknown (names the nearest one), or a setting is wrong.
    """
    if config is not None:
        targets = {target.name: target for target in configured_environments(config, overrides)}
        if name not in targets:
            raise ConfigError(
                f"{config} has no environment {name!r} in its section env{suggest_or_list(name, targets)}"
            )
        return targets[name]
    if "." not in name:
        try:
            environment_fqn(name)
        except ConfigError as error:
            raise ConfigError(
                f"{error} For a name of a configuration give --config FILE; a class is package.module.name."
            ) from None
    entry = load_config(EnvironmentEntry, overrides=[*overrides, f"class={name}"])
    return EnvironmentTarget(name, entry, entry_fqn(entry), DataConfig(), "class" if "." in name else "registered")


def configured_environments(config: str, overrides: Sequence[str] = ()) -> list[EnvironmentTarget]:
    """Return the environments of a configuration. Raises `ConfigError`."""
    checked = load_config(MasterConfig, config_path(config), overrides)
    entries = checked.env.entries() or {
        checked.env.name: EnvironmentEntry(class_=checked.env.name, config=checked.env.actor_kwargs(), max_turns=1)
    }
    return [
        EnvironmentTarget(name, entry, entry_fqn(entry), checked.data, "configuration")
        for name, entry in entries.items()
    ]


def registered_targets() -> list[EnvironmentTarget]:
    """Return the registered environments."""
    entries = {name: EnvironmentEntry(class_=name) for name in registered_environments()}
    return [
        EnvironmentTarget(name, entry, entry_fqn(entry), DataConfig(), "registered") for name, entry in entries.items()
    ]


def problem_of(problems: ProblemDataset, index: int) -> dict[str, Any]:
    """Return what `reset` receives for a problem. Raises `ConfigError` if there are fewer."""
    if not 0 <= index < len(problems):
        raise ConfigError(f"there is no problem {index}: the data set has the problems 0 to {len(problems) - 1}")
    problem = problems[index]
    return problem_record(problem.prompt, problem.answer, problem.index, problem.metadata)


def prepare(target: EnvironmentTarget, progress: Callable[[str, Progress], None]) -> str:
    """Build the venv of an environment if necessary, and return its interpreter.

    Args:
        progress: Called with the name of the venv and each event of its build.

    Raises:
        ConfigError: Its arguments are wrong.
        VenvError: The venv cannot be built, or workers cannot run in it.
    """
    declared_config(f"{target.label}.config", target.fqn, target.entry.config)
    venv_plan = plan_python(target.label, target.spec(), own_process=target.entry.own_process)
    name = f"environment-{target.name}"

    def report(event: Progress) -> None:
        if event.phase != "resolve":  # it has been planned above
            progress(name, event)

    return ensure(venv_plan, name, progress=report).python


@contextlib.contextmanager
def started(target: EnvironmentTarget, python: str) -> Iterator[EpisodeProcess]:
    """Run an environment in a child process during the block.

    Raises:
        EnvironmentFailure: It cannot be loaded; one sentence with the fix.
    """
    config = {
        key: value.model_dump(mode="json") if isinstance(value, ConfigModel) else value
        for key, value in target.entry.config.items()
    }
    variables = (target.entry.runtime_env or {}).get("env_vars") or {}
    try:
        with settings.exported(variables):
            process = EpisodeProcess(python, target.fqn, config, concurrency=target.entry.concurrency)
    except EnvironmentFailure as error:
        if settings.TRACEBACK.get():
            raise
        raise EnvironmentFailure(_with_fix(str(error).partition("\n")[0], target)) from None
    try:
        yield process
    finally:
        process.shutdown()


def _with_fix(sentence: str, target: EnvironmentTarget) -> str:
    if "ModuleNotFoundError" in sentence:
        return (
            f"{sentence}. Add its package to the Python of {target.label} (py_executable: uv run --extra EXTRA, or "
            "--with PACKAGE); a module that is not installed is found on PYTHONPATH"
        )
    return sentence


def state_of(target: EnvironmentTarget) -> tuple[str, str]:
    """Return the short py_executable of an environment, and the state of its venv."""
    from nemo_rl.cli.targets import short_python, venv_state

    try:
        spec = target.spec()
    except NemoRLError as error:
        return target.entry.py_executable or "", f"not known: {error}"
    return short_python(str(spec)), venv_state(spec, target.expected)[0]
