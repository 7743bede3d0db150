"""Tasksets and environments of `verifiers`, which drive the model by themselves.

Tested with verifiers 0.4.0 (`verifiers.v1`). It needs no data set: use `data: {train: {kind: seeds}}`.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import sys
import threading
from collections.abc import Mapping
from typing import Any

import verifiers.v1 as vf
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.utils.loaders import default_harness_id, load_environment, load_taskset, resolve_env_config

from nemo_rl import settings
from nemo_rl.environments.agent import Agent, Model
from nemo_rl.environments.episode import Turn

_HARNESS = "nemo_rl.environments.adapters.verifiers_harness"
_FIRST_VALIDATION_SEED = 2**31  # of the data sets of kind `seeds`
_LOADING = threading.Lock()
_numbers = itertools.count()


class Verifiers(Agent):
    """One episode of an environment of verifiers, with one task of a taskset.

    The reward is the sum of the task's weighted rewards, over all agents that are trained. The metrics are its rewards
    and metrics, by their names.

    Agents of the environment run without a container, and without a harness of their own with the chat program of
    verifiers, in this process.

    Args:
        taskset: Id of the taskset, or its configuration with the key `id`. The id is the name of an installed taskset,
            or of a module that exports the class.
        env: Configuration of the environment, as in the section `[env]` of verifiers: the `id` of an environment, the
            settings of its agents, `timeout`. By default it is the environment of the taskset, or else one agent.
        num_tasks: Number of tasks to use, the first ones. None: all; an endless taskset needs a number.
        num_validation_tasks: How many of them are only for validation, the last ones. With 0, training and validation
            use the same tasks.
        call_format: See `Agent`.

    Raises:
        ValueError: The configuration is wrong, or there are too few tasks.
    """

    def __init__(
        self,
        taskset: str | Mapping[str, Any],
        *,
        env: Mapping[str, Any] | None = None,
        num_tasks: int | None = None,
        num_validation_tasks: int = 0,
        call_format: str = "hermes",
    ) -> None:
        self.call_format = call_format
        named = {"id": taskset} if isinstance(taskset, str) else dict(taskset)
        content = json.dumps({**(env or {}), "taskset": named}, sort_keys=True)
        with _LOADING:  # the episodes of a worker begin at the same time
            self._config = _env_config(content)
            self._tasks = _tasks(content, num_tasks)
        self._num_validation = num_validation_tasks
        if not 0 <= num_validation_tasks < len(self._tasks):
            raise ValueError(
                f"num_validation_tasks is {num_validation_tasks}, but the taskset {named['id']!r} has "
                f"{len(self._tasks)} tasks; leave at least one for training"
            )

    async def run(self, problem: dict[str, Any], model: Model) -> Turn:  # type: ignore[override]
        """Play the episode. Raises `RuntimeError` with the error of a rollout that failed."""
        environment = load_environment(self._config)
        # verifiers reads keys only from variables. It does not pass on those whose names contain API_KEY.
        variable = f"NEMO_RL_MODEL_API_KEY_{next(_numbers)}"
        client = vf.EvalClientConfig(base_url=model.base_url, api_key_var=variable)
        context = vf.ModelContext(model=model.name, client=client)
        with settings.exported({variable: model.api_key}):
            async with environment.serving():
                episode = await environment.run_episode(self._task(problem["seed"]), context)
        return _turn(episode)

    def _task(self, seed: int) -> vf.Task:
        num_training = len(self._tasks) - self._num_validation
        if seed >= _FIRST_VALIDATION_SEED and self._num_validation:
            return self._tasks[num_training + (seed - _FIRST_VALIDATION_SEED) % self._num_validation]
        return self._tasks[seed % num_training]


def _turn(episode: vf.Episode) -> Turn:
    if not episode.ok:
        errors = [*episode.errors, *itertools.chain.from_iterable(trace.errors for trace in episode.traces)]
        raise RuntimeError("; ".join(f"{error.type}: {error.message}" for error in errors) or "the rollout failed")
    traces = [trace for trace in episode.traces if trace.agent is None or trace.agent.trainable]
    info: dict[str, float] = {}
    for trace in traces:
        info |= {name: reward.value for name, reward in trace.rewards.items() if reward is not None}
        info |= {name: value for name, value in trace.metrics.items() if value is not None}
    return Turn(sum(trace.reward for trace in traces), done=True, info=info)


@functools.cache
def _env_config(content: str) -> vf.EnvConfig:
    """Return a configuration whose agents run without containers."""
    raw = json.loads(content)
    raw["taskset"]["id"] = _importable(raw["taskset"]["id"])
    raw["id"] = _importable(raw.get("id", ""))
    for value in raw.values():
        if isinstance(value, dict) and isinstance(value.get("harness"), dict) and "id" in value["harness"]:
            value["harness"]["id"] = _importable(value["harness"]["id"])
    config = resolve_env_config(raw)
    # `bash` means that the taskset has no harness.
    has_harness = default_harness_id(config.taskset.id) != "bash"
    changes = {}
    for name, agent in agent_config_fields(config).items():
        update: dict[str, Any] = {}
        if agent.harness is None and not has_harness:
            update["harness"] = vf.AgentConfig(harness={"id": _importable(_HARNESS)}).harness
        if "runtime" not in agent.model_fields_set:
            update["runtime"] = vf.SubprocessConfig()
        changes[name] = agent.model_copy(update=update)
    return config.model_copy(update=changes)


@functools.cache
def _tasks(content: str, num_tasks: int | None) -> list[vf.Task]:
    taskset = load_taskset(_env_config(content).taskset)
    if num_tasks is None and not taskset.bounded:
        raise ValueError(f"the taskset {taskset.config.id!r} is endless: set num_tasks")
    return list(taskset if num_tasks is None else taskset.take(num_tasks))


def _importable(name: str) -> str:
    """Return an id under which verifiers finds a module. It only accepts modules that are in no package."""
    if "." not in name:
        return name
    alias = name.replace(".", "_").lower()
    sys.modules[alias] = importlib.import_module(name)
    return alias
