"""The environments with turns of a GRPO job: their problems, their loaders and their workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_rl.data.datasets import load_datasets
from nemo_rl.environments.answers import check_answer_keys
from nemo_rl.environments.config import EnvironmentEntry
from nemo_rl.environments.registry import entry_fqn

if TYPE_CHECKING:
    from datetime import datetime

    from nemo_rl.algorithms.config import MasterConfig
    from nemo_rl.algorithms.episodes import EpisodeCollector
    from nemo_rl.algorithms.eval_config import EvalConfig
    from nemo_rl.data.loader import MixedLoader, PromptLoader
    from nemo_rl.data.problem import ProblemDataset
    from nemo_rl.data.transcripts import TranscriptRenderer
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.environments.environment_group import EnvironmentGroup
    from nemo_rl.jobs.model_files import ModelFiles
    from nemo_rl.models.generation.interfaces import GenerationInterface


@dataclass(frozen=True)
class Problems:
    """Holds the problems of one environment."""

    train: ProblemDataset
    validation: ProblemDataset | None


def load_problems(config: MasterConfig) -> dict[str, Problems]:
    """Open the data sets of a job, by the name of the environment that they are for.

    Raises:
        ConfigError: The kind of a data set is unknown.
        DataError: A data set is missing or empty, or a record is invalid.
    """
    entries = config.env.entries()
    problems = {}
    for name, entry in entries.items() or {config.env.name: None}.items():
        data = config.data
        if entry is not None and entry.data is not None:
            data = data.model_copy(update={"train": entry.data.train, "validation": entry.data.validation})
        problems[name] = Problems(*load_datasets(data))
        if name == "math":
            for dataset in filter(None, (problems[name].train, problems[name].validation)):
                check_answer_keys(dataset, config.env.math.max_answer_chars)
    return problems


def make_loader(
    config: MasterConfig, problems: Mapping[str, Problems], model: ModelFiles, started: datetime
) -> PromptLoader | MixedLoader:
    """Tokenize the training problems and return the loader of all environments. Raises `DataError`."""
    from nemo_rl.data.loader import MixedLoader, PromptLoader
    from nemo_rl.data.processing import TokenizedProblems

    loaders = {
        name: PromptLoader(
            TokenizedProblems(parts.train, model.tokenizer, config.data, started),
            model.pad_token_id,
            seed=config.grpo.seed,
            shuffle=config.data.shuffle,
            num_epochs=config.grpo.max_num_epochs,
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
    config: MasterConfig, problems: Mapping[str, Problems], model: ModelFiles, started: datetime
) -> BatchedDataDict | None:
    """Tokenize the validation problems, an equal number for each environment. None if there are none."""
    from nemo_rl.data.loader import validation_batch
    from nemo_rl.data.processing import TokenizedProblems
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    datasets = {name: parts.validation for name, parts in problems.items() if parts.validation is not None}
    if not datasets:
        return None
    count = max(config.grpo.validation.max_num_problems // len(datasets), 1)
    batches = []
    for name, dataset in datasets.items():
        tokenized = TokenizedProblems(dataset, model.tokenizer, config.data, started)
        batch = validation_batch(tokenized, model.pad_token_id, count)
        if config.env.entries():
            batch["environment"] = [name] * batch.size
        batches.append(batch)
    return BatchedDataDict.from_batches(batches, pad_value_dict={"input_ids": model.pad_token_id})


def make_renderer(config: MasterConfig | EvalConfig, model: ModelFiles, started: datetime) -> TranscriptRenderer | None:
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


def start_environment(name: str, entry: EnvironmentEntry) -> EnvironmentGroup:
    """Start the workers of one environment; the group's `wait_ready` waits for them."""
    from nemo_rl.environments.environment_group import EnvironmentGroup

    return EnvironmentGroup(
        name,
        entry_fqn(entry),
        entry.config,
        py_executable=entry.py_executable,
        runtime_env=entry.runtime_env,
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


def make_collector(
    config: MasterConfig | EvalConfig,
    groups: Mapping[str, EnvironmentGroup],
    generation: GenerationInterface,
    renderer: TranscriptRenderer,
    pad_token_id: int,
) -> EpisodeCollector:
    """Return what collects the episodes of the job's environments."""
    from nemo_rl.algorithms.episodes import EpisodeCollector

    return EpisodeCollector(
        groups,
        config.env.entries(),
        generation,
        renderer,
        max_sequence_length=config.policy.max_sequence_length,
        pad_token_id=pad_token_id,
        max_retries=config.env.max_retries,
        max_failed_fraction=config.env.max_failed_fraction,
    )
