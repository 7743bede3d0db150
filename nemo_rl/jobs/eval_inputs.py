"""The inputs of an evaluation: its problems, and the check that its models differ in their weights only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl.data.datasets import open_validation
from nemo_rl.environments.answers import check_answer_keys
from nemo_rl.errors import ConfigError, ModelError
from nemo_rl.jobs.job_environments import data_sections, join_problems, make_renderer
from nemo_rl.jobs.model_files import ModelFiles, load_architecture, parameter_shapes, prepare_model
from nemo_rl.jobs.model_sources import label
from nemo_rl.models.generation.stop import end_of_sequence_ids
from nemo_rl.models.policy.config import EMBEDDED_MODELS
from nemo_rl.utils.names import suggest_or_list

if TYPE_CHECKING:
    from datetime import datetime

    from transformers import PretrainedConfig

    from nemo_rl.algorithms.eval_config import EvalConfig
    from nemo_rl.algorithms.rollouts import Rollout
    from nemo_rl.data.problem import ProblemDataset
    from nemo_rl.data.transcripts import TranscriptRenderer
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

# Keys of config.json that do not change what a model computes when it generates.
_IRRELEVANT = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


@dataclass(frozen=True)
class CheckedModels:
    """Holds what the models have in common.

    Attributes:
        files: tokenizer and padding token.
        shapes: shapes of the parameters, tied ones once.
    """

    files: ModelFiles
    shapes: dict[str, list[int]]


@dataclass(frozen=True)
class EvalInputs:
    """Holds the tokenized problems.

    Attributes:
        batch: all problems, with the list `environment` if the environments have turns.
        renderer: see `make_renderer`.
        digests: digest of the prompts and answers, by environment.
    """

    pad_token_id: int
    batch: BatchedDataDict
    renderer: TranscriptRenderer | None
    digests: dict[str, str]


def load_problems(config: EvalConfig) -> dict[str, ProblemDataset]:
    """Open the validation problems by the name of their environment. Their train data are not read.

    Raises:
        ConfigError: an environment has no validation problems, or the kind of a data set is unknown.
        DataError: a data set is missing or empty, or a record is invalid.
    """
    problems: dict[str, ProblemDataset] = {}
    for name, (key, data) in data_sections(config).items():
        dataset = open_validation(data)
        if dataset is None:
            raise ConfigError(
                f"there are no problems to evaluate on: {key}.validation is null; give --data FILE, or set "
                f"{key}.validation.path"
            )
        if name == "math":
            check_answer_keys(dataset, config.env.math.max_answer_chars)
        problems[name] = dataset
    return problems


def check_models(config: EvalConfig) -> CheckedModels:
    """Check that all models fit the configuration, and that their weights fit the workers of the first one.

    Raises:
        ConfigError: a model cannot be loaded or does not fit; it has another architecture or tokenizer than the first
            model; or its weights are of another model than its config.json describes.
    """
    from nemo_rl.models.weights.saved_weights import check_saved_weights

    names = config.eval.models
    policies = [config.policy.of_model(name) for name in names]
    architectures = [load_architecture(policy) for policy in policies]
    for name, architecture in zip(names, architectures, strict=True):
        difference = _different_key(architectures[0], architecture)
        if difference is not None:
            raise _another_model(config, name, difference)
    files = [prepare_model(policy, use_gpus=config.cluster.use_gpus) for policy in policies]
    end_ids: dict[str, set[int]] = {}
    for name, other, architecture in zip(names, files, architectures, strict=True):
        if name not in EMBEDDED_MODELS:  # which may not exist yet
            end_ids[name] = end_of_sequence_ids(name, architecture, other.tokenizer)
            if end_ids[name] != end_ids[next(iter(end_ids))]:
                raise _another_model(config, name, "eos_token_id of generation_config.json")
        for what in ("chat_template", "eos_token_id", "pad_token_id"):
            if getattr(other.tokenizer, what) != getattr(files[0].tokenizer, what):
                raise _another_model(config, name, f"{what} of the tokenizer")
        if other.tokenizer.get_vocab() != files[0].tokenizer.get_vocab():
            raise _another_model(config, name, "the vocabulary of the tokenizer")
    shapes = parameter_shapes(architectures[0])
    for name in names:
        try:
            check_saved_weights(str(Path(name).expanduser()), shapes)
        except ModelError as error:
            raise ConfigError(str(error)) from error
    return CheckedModels(files[0], shapes)


def _another_model(config: EvalConfig, name: str, difference: str) -> ConfigError:
    first = config.eval.models[0]
    return ConfigError(
        f"{label(name)} and {label(first)} are different models: {difference} differs, so the same workers cannot run "
        "both. Evaluate them by one command each"
    )


def _different_key(first: PretrainedConfig, other: PretrainedConfig) -> str | None:
    """Return the first key of config.json that differs, with both values. A policy trains without dropout."""
    before, after = first.to_dict(), other.to_dict()
    for key in sorted(before.keys() | after.keys()):
        is_relevant = key not in _IRRELEVANT and "drop" not in key
        if is_relevant and before.get(key) != after.get(key):
            return f"{key} ({after.get(key)} and {before.get(key)})"
    return None


def prepare_inputs(
    config: EvalConfig, problems: Mapping[str, ProblemDataset], files: ModelFiles, started: datetime
) -> EvalInputs:
    """Tokenize the problems, an equal number for each environment if `eval.max_num_problems` limits them.

    Raises:
        ConfigError: no problem has the field `eval.subject_key`, or a template is not supported.
        DataError: a prompt is too long.
    """
    from nemo_rl.data.processing import TokenizedProblems

    pad, limit = files.pad_token_id, config.eval.max_num_problems
    tokenized = {
        name: TokenizedProblems(dataset, files.tokenizer, config.data, started) for name, dataset in problems.items()
    }
    digests = {name: dataset.digest for name, dataset in tokenized.items()}
    count = None if limit is None else max(limit // len(problems), 1)
    joined = join_problems(config.env, tokenized, pad, count)
    _check_subject_key(config.eval.subject_key, joined["metadata"])
    return EvalInputs(pad, joined, make_renderer(config, files, started), digests)


def _check_subject_key(key: str | None, records: list[dict[str, Any]]) -> None:
    if key is not None and not any(key in record for record in records):
        fields = sorted({field for record in records for field in record})
        raise ConfigError(f"eval.subject_key={key}: no problem has this field{suggest_or_list(key, fields)}")


def sample_records(rollout: Rollout, inputs: EvalInputs, environment: str, step: int) -> list[dict[str, Any]]:
    """Return the records of all samples of a model for `RolloutFiles`. Their outcome is "scored" or "failed"."""
    from nemo_rl.algorithms.branches import training_rows
    from nemo_rl.algorithms.rollout_records import rollout_records

    rows = training_rows(rollout, num_parts=1, multiple_of=1, pad_token_id=inputs.pad_token_id)
    records = rollout_records(rollout, rows, weights_version=step, environment=environment)
    indices, scored = inputs.batch["problem_index"].tolist(), rollout.scored.tolist()
    for record in records:
        record["problem"] = str(indices[record["group"]])
        record["outcome"] = "scored" if scored[record["sample"]] else "failed"
    return records
