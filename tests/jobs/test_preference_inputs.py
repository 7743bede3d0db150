"""Inputs of jobs on preference pairs: what is prepared, and invalid input in one sentence before a worker starts."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from nemo_rl.algorithms.dpo_config import DPOJobConfig
from nemo_rl.algorithms.record_config import RecordJobConfig
from nemo_rl.algorithms.reward_model_config import RewardModelJobConfig
from nemo_rl.errors import CheckpointError, ConfigError, DataError, NemoRLError
from nemo_rl.jobs.attempt import Attempt
from nemo_rl.jobs.command_line import config_path
from nemo_rl.jobs.dpo_job import DPOAttempt, main
from nemo_rl.jobs.job_config import load_job_config
from nemo_rl.jobs.model_files import model_digest, parameter_shapes
from nemo_rl.jobs.record_job import RecordInputs
from nemo_rl.jobs.reward_model_job import RewardModelAttempt
from nemo_rl.jobs.roles import job_roles
from nemo_rl.jobs.run_directory import open_run_directory
from nemo_rl.models.embedded import make_tokenizer
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.policy_checkpoint import FORMAT, TRAINER_FILE
from nemo_rl.observability.console import ConsoleView
from nemo_rl.observability.timer import Timeline
from nemo_rl.utils.checkpoint import Checkpoint, CheckpointStore
from nemo_rl.utils.config import load_config

ATTEMPTS: dict[type[RecordJobConfig], Any] = {DPOJobConfig: DPOAttempt, RewardModelJobConfig: RewardModelAttempt}


def prepare(
    kind: type[RecordJobConfig], tmp_path: Path, *overrides: str, checkpoint: Checkpoint | None = None
) -> RecordInputs:
    defaults = [f"logger.log_dir={tmp_path / 'run'}", "data.train.max_num_records=64"]
    config: Any = load_config(kind, None, [*defaults, *overrides])
    run = open_run_directory(config, "job")
    with ExitStack() as stack:
        stack.callback(run.close)
        view = stack.enter_context(ConsoleView("job", 1))
        attempt = Attempt(run, view, Timeline(run.path, view), stack)
        job = ATTEMPTS[kind]
        return job(config, job_roles(config), {}, job.load_data(config.data), attempt).prepare_inputs(checkpoint)


def llama(directory: Path, **options: Any) -> Path:
    """Save a model for the embedded chat tokenizer."""
    tokenizer = make_tokenizer("embedded-chat")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(directory)
    for name, value in options.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ATTEMPTS)
def test_default_job_trains_on_generated_pairs(tmp_path: Path, kind: type[RecordJobConfig]) -> None:
    inputs = prepare(kind, tmp_path, "cluster.cpu_workers_per_node=4", f"{kind.section}.validation.max_num_records=13")
    assert inputs.num_steps == 2
    assert inputs.validation is not None
    assert inputs.validation["sample_mask"].tolist() == [1.0] * 26 + [0.0] * 6  # divided among four workers
    counts = json.loads((tmp_path / "run" / "data.json").read_text())
    assert counts["train"]["pairs"] == 64
    assert isinstance(load_job_config(config_path(f"{kind.section}_embedded")), kind)


@pytest.mark.parametrize(
    ("kind", "overrides", "error", "message"),
    [
        (DPOJobConfig, ["data.mask=markers"], ConfigError, "template has no {% generation %} markers"),
        (
            DPOJobConfig,
            ["policy.max_sequence_length=16"],
            DataError,
            "dialogue 0: the conversation has .* tokens",
        ),
        (
            DPOJobConfig,
            ["data.train.max_num_records=31"],
            DataError,
            "31 pairs in 1 epochs do not make one batch",
        ),
        (
            RewardModelJobConfig,
            ["policy.backend=megatron"],
            ConfigError,
            "backend=megatron does not train reward models",
        ),
        (RewardModelJobConfig, ["policy.lora.rank=2"], ConfigError, "policy.lora is not supported for reward models"),
        (
            RewardModelJobConfig,
            ["policy.max_sequence_length=4096"],
            ConfigError,
            "exceeds the context of embedded",
        ),
    ],
)
def test_invalid_input_is_refused(
    tmp_path: Path, kind: type[RecordJobConfig], overrides: list[str], error: type[NemoRLError], message: str
) -> None:
    with pytest.raises(error, match=message):
        prepare(kind, tmp_path, *overrides)


def test_reward_model_is_made_from_language_models_and_continued(tmp_path: Path) -> None:
    model, rewards, labels = (tmp_path / name for name in ("model", "rewards", "labels"))
    llama(model)
    for directory, num_labels in ((rewards, 1), (labels, 3)):
        llama(directory)
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=num_labels).save_pretrained(directory)
    for directory in (model, rewards):
        prepare(RewardModelJobConfig, tmp_path, f"policy.model_name={directory}", f"logger.log_dir={directory}-run")
    with pytest.raises(ConfigError, match="labels is a classifier with 3 labels, and a reward model has one"):
        prepare(RewardModelJobConfig, tmp_path, f"policy.model_name={labels}")
    with pytest.raises(ConfigError, match="is not a causal language model: it is a LlamaForSequenceClassification"):
        prepare(DPOJobConfig, tmp_path / "dpo", f"policy.model_name={rewards}")


def test_padding_token_at_the_end_of_conversations_is_refused(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", pad_token="<|end|>")
    with pytest.raises(ConfigError, match="conversations end with the padding token of .* another pad_token"):
        prepare(RewardModelJobConfig, tmp_path, f"policy.model_name={model}")


def saved(inputs: RecordInputs, tmp_path: Path, shapes: dict[str, list[int]], reference: str) -> Checkpoint:
    def write(directory: Path) -> None:
        (directory / "policy").mkdir()
        content = {"format": FORMAT, "num_steps": 1, "world_size": 1, "parameters": shapes}
        (directory / "policy" / TRAINER_FILE).write_text(json.dumps(content))

    state = {"loader": inputs.loader.state_dict(), "reference_model": reference}
    config = DPOJobConfig().checkpointing
    return CheckpointStore(tmp_path / "run" / "checkpoints", config).save(1, state, {}, write)


def test_changed_reference_model_is_refused(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    name = f"policy.model_name={model}"
    inputs = prepare(DPOJobConfig, tmp_path, name)
    digest = model_digest(PolicyConfig(model_name=str(model)))
    shapes = parameter_shapes(LlamaConfig.from_pretrained(model))
    checkpoint = saved(inputs, tmp_path, shapes, digest)
    prepare(DPOJobConfig, tmp_path, name, checkpoint=checkpoint)
    llama(model)  # other random weights
    with pytest.raises(CheckpointError, match="the weights of policy.model_name have changed since the run began"):
        prepare(DPOJobConfig, tmp_path, name, checkpoint=checkpoint)


def test_reward_checkpoint_of_a_language_model_is_refused(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    name = f"policy.model_name={model}"
    inputs = prepare(RewardModelJobConfig, tmp_path, name)
    shapes = parameter_shapes(LlamaConfig.from_pretrained(model))
    with pytest.raises(CheckpointError, match="of another model: lm_head.weight has .*none in policy.model_name"):
        prepare(RewardModelJobConfig, tmp_path, name, checkpoint=saved(inputs, tmp_path, shapes, ""))


def test_dry_run_plans_only_the_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", f"logger.log_dir={tmp_path / 'run'}"]) == 0
    output = capsys.readouterr().out
    assert "TorchPolicyWorker" in output
    assert "64 samples per step" in output
    assert not (tmp_path / "run").exists()
