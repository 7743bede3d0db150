"""Checks that a teacher fits its student, in the driver and before any venv is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_rl.errors import ConfigError, sentence
from nemo_rl.jobs.model_files import (
    check_model_fits,
    check_weight_files,
    load_architecture,
    load_tokenizer,
    vocabulary_size,
)
from nemo_rl.jobs.model_sources import find_model
from nemo_rl.models.policy.config import EMBEDDED_MODELS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nemo_rl.algorithms.distillation_config import DistillationJobConfig
    from nemo_rl.models.policy.config import PolicyConfig

_KEY = "teacher.model_name"


def with_resolved_teacher(config: DistillationJobConfig) -> DistillationJobConfig:
    """Return the configuration with the model that `teacher.model_name` stands for, such as a run's best checkpoint.

    Raises:
        ConfigError: it does not exist, or its weights are incomplete.
    """
    name = find_model(config.teacher.model_name, key=_KEY).name
    if name not in EMBEDDED_MODELS:
        check_weight_files(name, _KEY)
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"model_name": name})})


def num_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens of a tokenizer, without the padding of a model's vocabulary."""
    return 1 + max(tokenizer.get_vocab().values())


def check_teacher(config: DistillationJobConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the teacher can score what the student samples.

    The student's tokens must have the same ids in both. The vocabularies of the two models may be padded to different
    sizes, and the teacher may have further tokens.

    Args:
        config: the job's configuration, with a resolved teacher.
        tokenizer: the student's.

    Raises:
        ConfigError: the teacher cannot be loaded, has other tokens or a shorter context, or `top_k` is too large.
    """
    policy = config.teacher.as_policy(config.policy)
    try:
        model = load_architecture(policy)
        check_model_fits(policy, model)
        of_teacher = load_tokenizer(policy.tokenizer_name or policy.model_name)
    except ConfigError as error:
        raise ConfigError(f"{_KEY}: {sentence(error)}") from error
    _check_tokens(config.policy, tokenizer, policy, of_teacher)
    count, size = num_tokens(tokenizer), vocabulary_size(model)
    if size is not None and size < count:
        raise ConfigError(
            f"{_KEY}: {policy.model_name} has logits for {size} tokens, fewer than the {count} of the tokenizer; it "
            "cannot score all tokens of the student"
        )
    top_k = config.distillation.top_k
    if config.distillation.objective == "top_k" and top_k >= count:
        raise ConfigError(f"distillation.top_k={top_k} must be less than the {count} tokens of the vocabulary")


def _check_tokens(
    student: PolicyConfig,
    of_student: PreTrainedTokenizerBase,
    teacher: PolicyConfig,
    of_teacher: PreTrainedTokenizerBase,
) -> None:
    names = f"{teacher.model_name} (teacher.model_name) and {student.model_name} (policy.model_name)"
    known = of_teacher.get_vocab()
    different = sorted((id, token) for token, id in of_student.get_vocab().items() if known.get(token) != id)
    if different:
        id, token = different[0]
        raise ConfigError(
            f"{names} have different tokenizers: {len(different)} tokens of the student, such as {token!r} ({id}), "
            f"have {f'the id {known[token]}' if token in known else 'no id'} in the teacher's; choose a teacher with "
            "the student's tokenizer"
        )
    for kind in ("bos_token", "eos_token"):
        ours, theirs = getattr(of_student, f"{kind}_id"), getattr(of_teacher, f"{kind}_id")
        if ours != theirs:
            raise ConfigError(
                f"{names} have different special tokens: {kind} is {getattr(of_student, kind)!r} ({ours}) for the "
                f"student and {getattr(of_teacher, kind)!r} ({theirs}) for the teacher; set teacher.tokenizer_name or "
                "policy.tokenizer_name if both models were trained with the same one"
            )
