"""A teacher that does not fit its student is reported in one sentence, before a worker starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_rl.algorithms.distillation_config import DistillationJobConfig
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.command_line import config_path
from nemo_rl.jobs.distillation_job import main
from nemo_rl.jobs.job_config import load_job_config
from nemo_rl.jobs.model_files import load_tokenizer
from nemo_rl.jobs.plan import make_plan
from nemo_rl.jobs.teacher_files import check_teacher, num_tokens, with_resolved_teacher
from nemo_rl.models.embedded import architecture, make_tokenizer
from nemo_rl.models.policy.config import EmbeddedModelConfig
from nemo_rl.utils.checkpoint import CheckpointingConfig, CheckpointStore
from nemo_rl.utils.config import load_config

TOKENIZER = load_tokenizer("embedded")
COUNT = num_tokens(TOKENIZER)


def job(*overrides: str) -> DistillationJobConfig:
    return load_config(DistillationJobConfig, None, list(overrides))


def saved(directory: Path, tokens: str = "embedded", **changes: object) -> str:
    """Save a teacher without weights; returns the override that names it."""
    tokenizer = make_tokenizer(tokens)
    tokenizer.save_pretrained(directory)
    content = architecture(EmbeddedModelConfig(), tokenizer).to_dict() | changes
    (directory / "config.json").write_text(json.dumps(content))
    return f"teacher.model_name={directory}"


def check(*overrides: str) -> None:
    check_teacher(job(*overrides), TOKENIZER)


def test_padded_vocabulary_of_the_teacher_is_accepted(tmp_path: Path) -> None:
    check(saved(tmp_path, vocab_size=COUNT + 100))


def test_teacher_with_other_tokens_is_refused(tmp_path: Path) -> None:
    message = r"\(teacher.model_name\) and embedded \(policy.model_name\) have different tokenizers: .* such as"
    with pytest.raises(ConfigError, match=message):
        check(saved(tmp_path, "embedded-chat"))


def test_teacher_with_another_end_of_sequence_is_refused(tmp_path: Path) -> None:
    name = saved(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": TOKENIZER.convert_ids_to_tokens(5)}))
    with pytest.raises(
        ConfigError, match="have different special tokens: eos_token is .* for the student and .*teacher"
    ):
        check(name)


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"max_position_embeddings": 100}, [], "teacher.model_name: .*max_sequence_length=128 exceeds the context"),
        ({"vocab_size": COUNT - 1}, [], f"has logits for {COUNT - 1} tokens, fewer than the {COUNT} of the tokenizer"),
        ({"is_encoder_decoder": True}, [], "teacher.model_name: .* not a causal language model: it has an encoder"),
        (
            {},
            ["distillation.objective=top_k", f"distillation.top_k={COUNT}"],
            f"distillation.top_k={COUNT} must be less than the {COUNT} tokens",
        ),
    ],
)
def test_teacher_that_cannot_score_the_student_is_refused(
    tmp_path: Path, changes: dict[str, object], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(saved(tmp_path, **changes), *overrides)


def test_missing_or_incomplete_teacher_is_reported_with_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"teacher.model_name={tmp_path / 'none'}"]) == 2
    assert f"teacher.model_name: there is no directory {tmp_path / 'none'}" in capsys.readouterr().err
    assert main([saved(tmp_path)]) == 2
    assert f"teacher.model_name: {tmp_path} has no weights" in capsys.readouterr().err


def test_directory_of_a_run_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        saved(directory / "policy" / "model")
        (directory / "policy" / "model" / "pytorch_model.bin").touch()

    store = CheckpointStore(tmp_path / "checkpoints", CheckpointingConfig())
    for step, accuracy in ((1, 0.9), (2, 0.5)):
        store.save(step, {}, {"val/accuracy": accuracy}, write)
    (tmp_path / "config.yaml").write_text("checkpointing: {}")
    config = with_resolved_teacher(job(f"teacher.model_name={tmp_path}"))
    assert config.teacher.model_name == str(tmp_path / "checkpoints" / "step_000001" / "policy" / "model")


def test_plan_shows_the_teacher_on_shared_and_on_own_bundles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "TorchTeacherWorker" in output
    assert "policy-0, generation-0, teacher-0" in output
    assert ", teacher 0.00" in output
    plan = make_plan(job("teacher.cluster.cpu_workers_per_node=2"))
    assert [(place.bundle, place.workers) for place in plan.placements[:3]] == [
        ("node 0, CPU 0", "policy-0, generation-0"),
        ("teacher node 0, CPU 0", "teacher-0"),
        ("teacher node 0, CPU 1", "teacher-1"),
    ]
    assert {role.name: role.share for role in plan.roles if role.share} == {
        "policy": 0.5,
        "generation": 0.5,
        "teacher": 1.0,
    }
    assert isinstance(load_job_config(config_path("distillation_embedded")), DistillationJobConfig)
