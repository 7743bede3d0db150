"""The environments of a job: their problems, their loaders and their workers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_rl.data.datasets import load_datasets
from nemo_rl.environments.answers import check_answer_keys
from nemo_rl.environments.config import EnvironmentEntry
from nemo_rl.environments.registry import entry_fqn, entry_runtime_env

if TYPE_CHECKING:
    from datetime import datetime

    from nemo_rl.algorithms.config import OnPolicyJobConfig
    from nemo_rl.algorithms.episodes import EpisodeCollector
    from nemo_rl.algorithms.eval_config import EvalConfig
    from nemo_rl.data.config import DataConfig
    from nemo_rl.data.loader import MixedLoader, PromptLoader
    from nemo_rl.data.problem import ProblemDataset
    from nemo_rl.data.processing import TokenizedProblems
    from nemo_rl.data.transcripts import TranscriptRenderer
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.environments.config import EnvironmentConfig
    from nemo_rl.environments.environment_group import EnvironmentGroup
    from nemo_rl.environments.remote import RemoteEnvironment
    from nemo_rl.jobs.model_files import ModelFiles
    from nemo_rl.models.generation.interfaces import GenerationInterface


@dataclass(frozen=True)
class Problems:
    """Holds the problems of one environment."""

    train: ProblemDataset
    validation: ProblemDataset | None


def data_sections(config: OnPolicyJobConfig | EvalConfig) -> dict[str, tuple[str, DataConfig]]:
    """Return the key and the section of the problems of each environment, by its name."""
    sections = {}
    for name, entry in config.env.entries().items() or {config.env.name: None}.items():
        key, data = "data", config.data
        if entry is not None and entry.data is not None:
            key = f"env.{name}.data"
            data = data.model_copy(update={"train": entry.data.train, "validation": entry.data.validation})
        sections[name] = (key, data)
    return sections


def load_problems(config: OnPolicyJobConfig) -> dict[str, Problems]:
    """Open the data sets of a job, by the name of the environment that they are for.

    Raises:
        ConfigError: The kind of a data set is unknown.
        DataError: A data set is missing or empty, or a record is invalid.
    """
    problems = {}
    for name, (_, data) in data_sections(config).items():
        problems[name] = Problems(*load_datasets(data))
        if name == "math":
            for dataset in filter(None, (problems[name].train, problems[name].validation)):
                check_answer_keys(dataset, config.env.math.max_answer_chars)
    return problems


def make_loader(
    config: OnPolicyJobConfig, problems: Mapping[str, Problems], model: ModelFiles, started: datetime
) -> PromptLoader | MixedLoader:
    """Tokenize the training problems and return the loader of all environments. Raises `DataError`."""
    from nemo_rl.data.loader import MixedLoader, PromptLoader
    from nemo_rl.data.processing import TokenizedProblems

    loaders = {
        name: PromptLoader(
            TokenizedProblems(parts.train, model.tokenizer, config.data, started),
            model.pad_token_id,
            seed=config.algorithm.seed,
            shuffle=config.data.shuffle,
            num_epochs=config.algorithm.max_num_epochs,
        )
        for name, parts in problems.items()
    }
    entries = config.env.entries()
    if not entries:
        [loader] = loaders.values()
        return loader
    return MixedLoader(
        loaders, lambda step: {name: entry.weight_at(step) for name, entry in entries.items()}, model.pad_token_id
    )


def make_validation_batch(
    config: OnPolicyJobConfig, problems: Mapping[str, Problems], model: ModelFiles, started: datetime
) -> BatchedDataDict | None:
    """Tokenize the validation problems, an equal number for each environment. None if there are none."""
    from nemo_rl.data.processing import TokenizedProblems

    tokenized = {
        name: TokenizedProblems(parts.validation, model.tokenizer, config.data, started)
        for name, parts in problems.items()
        if parts.validation is not None
    }
    if not tokenized:
        return None
    count = max(config.algorithm.validation.max_num_problems // len(tokenized), 1)
    return join_problems(config.env, tokenized, model.pad_token_id, count)


def join_problems(
    config: EnvironmentConfig, problems: Mapping[str, TokenizedProblems], pad_token_id: int, count: int | None
) -> BatchedDataDict:
    """Return the first `count` problems of each environment (None: all), with the list `environment` if it is needed.

    Args:
        config: The environments.
        problems: Their problems, by the name of the environment.
        pad_token_id: See `collation.collate`.
        count: Problems per environment.
    """
    from nemo_rl.data.loader import validation_batch
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    batches = []
    for name, tokenized in problems.items():
        batch = validation_batch(tokenized, pad_token_id, count)
        if config.entries():
            batch["environment"] = [name] * batch.size
        batches.append(batch)
    return BatchedDataDict.from_batches(batches, pad_value_dict={"input_ids": pad_token_id})


def make_renderer(
    config: OnPolicyJobConfig | EvalConfig, model: ModelFiles, started: datetime
) -> TranscriptRenderer | None:
    """Return what renders the observations of environments with turns; None if there are no such environments.

    Raises:
        ConfigError: The chat template does not support several turns. See `TurnRenderer`.
    """
    entries = config.env.entries()
    if not entries:
        return None
    from nemo_rl.data.transcripts import TranscriptRenderer

    return TranscriptRenderer(
        model.tokenizer,
        config.data,
        has_turns=any(entry.max_turns > 1 for entry in entries.values()),
        keep_thinking=config.data.keep_thinking,
        now=started,
    )


def start_environments(config: EnvironmentConfig, stack: ExitStack) -> dict[str, RemoteEnvironment | EnvironmentGroup]:
    """Start the workers of all environments; returns them by the name of their role. `wait_ready` waits for them.

    Args:
        config: The environments.
        stack: Receives a shutdown callback for each of them.
    """
    from nemo_rl.environments.remote import RemoteEnvironment

    started: dict[str, RemoteEnvironment | EnvironmentGroup] = {
        f"environment {name}": _start_group(name, entry) for name, entry in config.entries().items()
    }
    if not started:
        started["environment"] = RemoteEnvironment(config)
    for environment in started.values():
        stack.callback(environment.shutdown)
    return started


def _start_group(name: str, entry: EnvironmentEntry) -> EnvironmentGroup:
    from nemo_rl.environments.environment_group import EnvironmentGroup

    return EnvironmentGroup(
        name,
        entry_fqn(entry),
        entry.config,
        py_executable=entry.py_executable,
        runtime_env=entry_runtime_env(f"env.{name}", entry),
        own_process=entry.own_process,
        num_replicas=entry.num_replicas,
        num_cpus=entry.num_cpus,
        num_gpus=entry.num_gpus,
        resources=entry.resources,
        concurrency=entry.concurrency,
        step_timeout_s=entry.step_timeout_s,
        memory_limit_mb=entry.memory_limit_mb,
        max_restarts=entry.max_restarts,
    )


def rollout_environment(
    config: OnPolicyJobConfig | EvalConfig,
    started: Mapping[str, RemoteEnvironment | EnvironmentGroup],
    generation: GenerationInterface,
    renderer: TranscriptRenderer | None,
    pad_token_id: int,
    stack: ExitStack,
) -> RemoteEnvironment | EpisodeCollector:
    """Return what rollouts are collected from: the environment that scores batches, or the episodes of all others.

    Args:
        config: The job's configuration.
        started: See `start_environments`.
        generation: Samples the actions of episodes.
        renderer: See `make_renderer`.
        pad_token_id: Fills the rows of a batch.
        stack: Receives a callback that closes it.
    """
    from nemo_rl.environments.remote import RemoteEnvironment

    groups: dict[str, EnvironmentGroup] = {}
    for role, environment in started.items():
        if isinstance(environment, RemoteEnvironment):
            return environment
        groups[role.removeprefix("environment ")] = environment
    assert renderer is not None, "environments with turns need a renderer"
    from nemo_rl.algorithms.episodes import EpisodeCollector

    collector = EpisodeCollector(
        groups,
        config.env.entries(),
        generation,
        renderer,
        max_sequence_length=config.policy.max_sequence_length,
        pad_token_id=pad_token_id,
        max_retries=config.env.max_retries,
        max_failed_fraction=config.env.max_failed_fraction,
    )
    stack.callback(collector.close)
    return collector
