"""Invalid input of supervised fine-tuning is reported in one sentence, before a worker starts."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.algorithms.sft_config import SFTJobConfig
from nemo_rl.data.conversations import load_conversations
from nemo_rl.errors import CheckpointError, ConfigError, DataError, NemoRLError
from nemo_rl.jobs.attempt import Attempt
from nemo_rl.jobs.command_line import config_path
from nemo_rl.jobs.job_config import load_job_config
from nemo_rl.jobs.model_files import parameter_shapes
from nemo_rl.jobs.record_job import RecordInputs
from nemo_rl.jobs.roles import job_roles
from nemo_rl.jobs.run_directory import open_run_directory
from nemo_rl.jobs.sft_job import SFTAttempt, main
from nemo_rl.models.embedded import architecture, make_tokenizer
from nemo_rl.models.policy.config import EmbeddedModelConfig
from nemo_rl.models.policy.policy_checkpoint import FORMAT, TRAINER_FILE
from nemo_rl.observability.console import ConsoleView
from nemo_rl.observability.timer import Timeline
from nemo_rl.utils.checkpoint import Checkpoint, CheckpointStore
from nemo_rl.utils.config import load_config

USER = [{"role": "user", "content": "1*1"}]


def job(tmp_path: Path, *overrides: str) -> SFTJobConfig:
    return load_config(SFTJobConfig, None, [f"logger.log_dir={tmp_path / 'run'}", *overrides])


def prepare(config: SFTJobConfig, checkpoint: Checkpoint | None = None) -> RecordInputs:
    run = open_run_directory(config, "job")
    with ExitStack() as stack:
        stack.callback(run.close)
        view = stack.enter_context(ConsoleView("job", 1))
        attempt = Attempt(run, view, Timeline(run.path, view), stack)
        data = load_conversations(config.data)
        return SFTAttempt(config, job_roles(config), {}, data, attempt).prepare_inputs(checkpoint)


def data_file(tmp_path: Path, *records: object) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"data.train.path={path}"


def test_default_job_trains_the_embedded_model_on_generated_dialogues(tmp_path: Path) -> None:
    inputs = prepare(job(tmp_path))
    assert inputs.num_steps == 128
    assert inputs.validation is not None
    assert inputs.validation["sample_mask"].sum() == 256
    counts = json.loads((tmp_path / "run" / "data.json").read_text())
    assert counts["train"]["conversations"] == 4096
    assert 0 < counts["train"]["loss_tokens"] < counts["train"]["tokens"]


@pytest.mark.parametrize(
    ("overrides", "num_steps"),
    [
        (["sft.max_num_epochs=3"], 3),
        (["sft.max_num_epochs=3", "sft.max_num_steps=2"], 2),
        (["sft.max_num_epochs=null", "sft.max_num_steps=50"], 50),
    ],
)
def test_number_of_steps(tmp_path: Path, overrides: list[str], num_steps: int) -> None:
    assert prepare(job(tmp_path, "data.train.max_num_records=40", *overrides)).num_steps == num_steps


def test_validation_rows_are_divided_among_the_workers(tmp_path: Path) -> None:
    inputs = prepare(job(tmp_path, "sft.validation.max_num_records=13", "cluster.cpu_workers_per_node=4"))
    assert inputs.validation is not None
    assert inputs.validation["sample_mask"].tolist() == [1.0] * 13 + [0.0] * 3


@pytest.mark.parametrize(
    ("records", "overrides", "error", "message"),
    [
        ([{"messages": USER}], [], DataError, "data.jsonl:1: there is no turn of the assistant to learn"),
        ([{"text": "a"}], [], DataError, "data.jsonl:1: no key 'messages'"),
        ([], ["data.mask=markers"], ConfigError, "template has no {% generation %} markers"),
        ([], ["policy.model_name=embedded"], DataError, "dialogue 0: .* but the tokenizer has no chat template"),
        ([], ["policy.max_sequence_length=16"], DataError, "dialogue 0: the conversation has .* tokens, more than"),
        ([], ["data.train.max_num_records=31"], DataError, "31 conversations in 1 epochs do not make one batch of 32"),
        ([], ["policy.max_sequence_length=4096"], ConfigError, "exceeds the context of embedded-chat, 512 tokens"),
    ],
)
def test_invalid_input_is_refused(
    tmp_path: Path, records: list[object], overrides: list[str], error: type[NemoRLError], message: str
) -> None:
    if records:
        overrides = [*overrides, data_file(tmp_path, *records)]
    with pytest.raises(error, match=message):
        prepare(job(tmp_path, *overrides))


def saved(config: SFTJobConfig, inputs: RecordInputs, tmp_path: Path, shapes: dict[str, list[int]]) -> Checkpoint:
    def write(directory: Path) -> None:
        (directory / "policy").mkdir()
        content = {"format": FORMAT, "num_steps": 1, "world_size": 1, "parameters": shapes}
        (directory / "policy" / TRAINER_FILE).write_text(json.dumps(content))

    state = {"loader": inputs.loader.state_dict()}
    return CheckpointStore(tmp_path / "run" / "checkpoints", config.checkpointing).save(1, state, {}, write)


def shapes_of(width: int) -> dict[str, list[int]]:
    tokenizer = make_tokenizer("embedded-chat")
    return parameter_shapes(architecture(EmbeddedModelConfig(hidden_size=width), tokenizer))


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    config = job(tmp_path)
    inputs = prepare(config)
    prepare(config, saved(config, inputs, tmp_path, shapes_of(128)))
    message = r"it is of another model: .* \[\d+, 64\] in the checkpoint and \[\d+, 128\] in policy.model_name.* remove"
    with pytest.raises(CheckpointError, match=message):
        prepare(config, saved(config, inputs, tmp_path, shapes_of(64)))


def test_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    record = {"prompt": "1*1", "completion": "1"}
    config = job(tmp_path, data_file(tmp_path, *[record] * 40))
    checkpoint = saved(config, prepare(config), tmp_path, shapes_of(128))
    data_file(tmp_path, *[record] * 39, {"prompt": "1*1", "completion": "2"})
    with pytest.raises(CheckpointError, match="belongs to other data: digest was"):
        prepare(config, checkpoint)


def test_file_with_a_section_of_the_algorithm_is_loaded_as_its_job(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent.yaml", tmp_path / "child.yaml"
    parent.write_text("sft: {max_num_epochs: 2}")
    child.write_text("defaults: parent.yaml\npolicy: {max_sequence_length: 64}")
    config = load_job_config(child, ["sft.seed=1"])
    assert isinstance(config, SFTJobConfig)
    assert (config.sft.max_num_epochs, config.sft.seed) == (2, 1)
    assert isinstance(load_job_config(config_path("grpo_math_embedded")), MasterConfig)


def test_dry_run_plans_only_the_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", f"logger.log_dir={tmp_path / 'run'}"]) == 0
    output = capsys.readouterr().out
    assert "TorchPolicyWorker" in output
    assert "32 samples per step" in output
    assert "generation" not in output
    assert not (tmp_path / "run").exists()


def test_unknown_keys_and_paths_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft.max_steps=3"]) == 2
    assert "unknown key sft.max_steps; did you mean sft.max_num_steps?" in capsys.readouterr().err
    assert main([f"data.train.path={tmp_path / 'none.jsonl'}"]) == 2
    assert "does not exist" in capsys.readouterr().err
