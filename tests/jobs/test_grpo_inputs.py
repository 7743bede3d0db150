"""Tests what a GRPO job prepares and checks before it builds a venv, in the process of the driver."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.errors import CheckpointError
from nemo_rl.jobs.attempt import Attempt
from nemo_rl.jobs.grpo_job import GRPOAttempt
from nemo_rl.jobs.job_environments import load_problems
from nemo_rl.jobs.model_files import parameter_shapes
from nemo_rl.jobs.on_policy_job import OnPolicyInputs
from nemo_rl.jobs.roles import job_roles
from nemo_rl.jobs.run_directory import RunDirectory, open_run_directory
from nemo_rl.models.embedded import architecture, make_tokenizer
from nemo_rl.models.policy.config import EmbeddedModelConfig
from nemo_rl.models.policy.policy_checkpoint import FORMAT, TRAINER_FILE
from nemo_rl.observability.console import ConsoleView
from nemo_rl.observability.timer import Timeline
from nemo_rl.utils.checkpoint import Checkpoint, CheckpointStore
from nemo_rl.utils.config import load_config

# Differs at every rendering, as a date does after midnight.
DATED = "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }} {% for m in messages %}{{ m.content }}{% endfor %}="


@pytest.fixture
def job(tmp_path: Path) -> MasterConfig:
    """Return the configuration of a run whose prompts have a date."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{i}+1", "answer": f"{i + 1}"}) + "\n" for i in range(8)))
    overrides = [
        f"policy.tokenizer_name={tmp_path / 'tokenizer'}",
        f"data.train.path={data}",
        f"data.validation.path={data}",
        f"logger.log_dir={tmp_path / 'run'}",
    ]
    return load_config(MasterConfig, None, overrides)


def prepare(config: MasterConfig, checkpoint: Checkpoint | None = None) -> tuple[RunDirectory, OnPolicyInputs]:
    run = open_run_directory(config, "job")
    with ExitStack() as stack:
        stack.callback(run.close)
        view = stack.enter_context(ConsoleView("job", 1))
        timeline = Timeline(run.path, view)
        parts = Attempt(run, view, timeline, stack)
        attempt = GRPOAttempt(config, job_roles(config), {}, load_problems(config), parts)
        return run, attempt._prepare_inputs(checkpoint)


def saved(run: RunDirectory, config: MasterConfig, inputs: OnPolicyInputs, width: int = 128) -> Checkpoint:
    """Write a checkpoint of an embedded model of this width."""
    shapes = parameter_shapes(architecture(EmbeddedModelConfig(hidden_size=width), make_tokenizer()))

    def write(directory: Path) -> None:
        (directory / "policy").mkdir()
        content = {"format": FORMAT, "num_steps": 1, "world_size": 1, "parameters": shapes}
        (directory / "policy" / TRAINER_FILE).write_text(json.dumps(content))

    state = {"rollouts": {"loader": inputs.loader.state_dict()}}
    return CheckpointStore(run.checkpoint_dir, config.checkpointing).save(1, state, {}, write)


def test_resumed_run_has_the_prompts_of_its_first_day(job: MasterConfig) -> None:
    run, first = prepare(job)
    batch = first.loader.next_batch(4)
    assert batch is not None
    checkpoint = saved(run, job, first)
    again, second = prepare(job, checkpoint)
    assert again.started == run.started
    expected, resumed = first.loader.next_batch(4), second.loader.next_batch(4)
    assert expected is not None
    assert resumed is not None
    assert first.validation is not None
    assert second.validation is not None
    assert resumed["input_ids"].tolist() == expected["input_ids"].tolist()
    assert second.validation["input_ids"].tolist() == first.validation["input_ids"].tolist()
    date = run.started.strftime("%d %b %Y %H:%M:%S.%f")
    assert all(prompt.startswith(date) for prompt in [*expected["prompt"], *second.validation["prompt"]])


def test_another_run_has_another_date(job: MasterConfig, tmp_path: Path) -> None:
    other = job.model_copy(update={"logger": job.logger.model_copy(update={"log_dir": str(tmp_path / "other")})})
    first, second = prepare(job)[1], prepare(other)[1]
    assert first.loader.state_dict()["digest"] != second.loader.state_dict()["digest"]


def test_checkpoint_of_another_model_is_refused_before_anything_is_built(job: MasterConfig) -> None:
    run, inputs = prepare(job)
    checkpoint = saved(run, job, inputs, width=64)
    with pytest.raises(CheckpointError, match=r"it is of another model: .* \[\d+, 64\] in the checkpoint"):
        prepare(job, checkpoint)


def test_changed_data_are_reported_before_anything_is_built(job: MasterConfig) -> None:
    run, inputs = prepare(job)
    checkpoint = saved(run, job, inputs)
    assert job.data.train.path is not None
    with Path(job.data.train.path).open("a") as file:
        file.write(json.dumps({"problem": "9+9", "answer": "18"}) + "\n")
    with pytest.raises(CheckpointError, match="belongs to other data: num_problems was 8 and is now 9"):
        prepare(job, checkpoint)
