"""What `nemo-rl eval` accepts and refuses before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.algorithms.eval_config import EvalConfig
from nemo_rl.errors import ConfigError
from nemo_rl.jobs import eval_job
from nemo_rl.jobs.command_line import JobArguments
from nemo_rl.jobs.eval_inputs import check_models, load_problems, prepare_inputs
from nemo_rl.jobs.model_sources import label
from nemo_rl.jobs.run_directory import open_run_directory
from nemo_rl.models.embedded import make_model, make_tokenizer
from nemo_rl.models.policy.config import EmbeddedModelConfig
from nemo_rl.utils.checkpoint import CheckpointStore
from nemo_rl.utils.config import load_config

SMALL = EmbeddedModelConfig(hidden_size=32, num_layers=1)


def save_model(directory: Path, config: EmbeddedModelConfig = SMALL) -> Path:
    """Write an untrained embedded model."""
    tokenizer = make_tokenizer()
    make_model(config, tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save_model(tmp_path / "model"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run with checkpoints of steps 1 to 3, of which that of step 2 is the best."""
    config = load_config(MasterConfig, None, [f"logger.log_dir={tmp_path / 'run'}", "grpo.seed=7"])
    directory = open_run_directory(config, "job")
    store = CheckpointStore(directory.checkpoint_dir, config.checkpointing)
    for step, accuracy in ((1, 0.2), (2, 0.6), (3, 0.4)):
        store.save(step, {}, {"val/accuracy": accuracy}, lambda path: save_model(path / "policy" / "model") and None)
    directory.close()
    return directory.path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch):
    """Return a function that parses a command line as `nemo-rl eval` does and returns the configuration."""

    def load(*argv: object) -> EvalConfig:
        received: list[JobArguments[EvalConfig]] = []
        monkeypatch.setattr(eval_job, "run_eval", received.append)
        assert eval_job.main(list(map(str, argv))) == 0
        return received[0].config

    return load


def error(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Return the error of a command line that is refused with exit code 2."""
    capsys.readouterr()
    assert eval_job.main(list(map(str, argv))) == 2
    return capsys.readouterr().err


def test_run_means_its_best_checkpoint_and_its_configuration(run, loaded):
    config = loaded(run)
    assert config.eval.models == [str(run / "checkpoints" / "step_000002" / "policy" / "model")]
    assert (config.eval.seed, config.eval.max_num_problems, config.logger.log_dir) == (7, 256, None)


def test_step_chooses_a_checkpoint_of_the_run(run, loaded):
    assert "step_000003" in loaded(run, "--step", 3).eval.models[0]


def test_checkpoints_and_models_are_compared(run, model, loaded):
    checkpoint = run / "checkpoints" / "step_000001"
    config = loaded(model, checkpoint, checkpoint.with_name("step_000003") / "policy", "embedded", "eval.seed=1")
    assert [label(name) for name in config.eval.models] == [
        model,
        str(run / "step_000001"),
        str(run / "step_000003"),
        "embedded",
    ]
    assert config.eval.seed == 1


def test_data_replaces_the_validation_problems(run, loaded, tmp_path):
    config = loaded(run, "--data", tmp_path / "test.jsonl", "data.validation.prompt_key=question")
    assert config.data.validation.path == str(tmp_path / "test.jsonl")
    assert (config.data.validation.kind, config.data.validation.prompt_key) == ("auto", "question")


def test_directory_with_an_equals_sign_is_a_model(loaded, tmp_path):
    model = save_model(tmp_path / "lr=0.1")
    assert loaded(model, "eval.seed=3").eval.models == [str(model)]


def test_default_configuration_is_that_of_the_embedded_job(loaded):
    config = loaded("embedded")
    assert (config.env.math.answer_format, config.policy.generation.max_new_tokens) == ("whole", 8)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name a model to evaluate"),
        (["embedded", "embedded"], "embedded is given twice"),
        (["embedded", "--step", "3"], "--step 3 chooses a checkpoint of a run"),
        (["./missing"], "there is no directory ./missing"),
        (["embedded", "eval.num_generation=2"], "did you mean eval.num_generations"),
        (["embedded", "eval.k=[3]"], "pass@3 needs k from 1 to eval.num_generations=1"),
        (["embedded", "env.name=maths"], "maths"),
        (["embedded", "--data", "missing.jsonl"], "missing.jsonl"),
        (["embedded", "--config", "grpo_guess_number", "--data", "x.jsonl"], "env.guess_number.data.validation.path"),
        (["embedded", "data.train.path=x.jsonl"], "data.validation is null; give --data FILE"),
        (["embedded", "policy.generation.num_workers=3"], "only 1 workers fit"),
    ],
)
def test_invalid_command_line(capsys, argv, message):
    assert message in error(capsys, *argv)


def test_directory_that_is_no_model(capsys, tmp_path):
    assert "is neither a Hugging Face model" in error(capsys, tmp_path)


def test_unknown_step_lists_the_steps(run, capsys):
    assert "has checkpoints of the steps 1, 2, 3" in error(capsys, run, "--step", 9)


def test_run_without_checkpoints(run, capsys):
    shutil.rmtree(run / "checkpoints")
    assert "has no complete checkpoint" in error(capsys, run)


def test_incomplete_checkpoint(run, capsys):
    checkpoint = run / "checkpoints" / "step_000001"
    (checkpoint / "checkpoint.json").unlink()
    assert "is not a complete checkpoint" in error(capsys, checkpoint)


def test_run_of_another_job_needs_a_configuration(run, capsys, loaded):
    content = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(content.replace("grpo:", "other:", 1))
    assert "name a configuration" in error(capsys, run)
    assert loaded(run, "--config", "grpo_math_embedded").eval.models


def test_another_architecture_is_refused_before_anything_starts(model, capsys, tmp_path):
    wide = save_model(tmp_path / "wide", EmbeddedModelConfig(hidden_size=64, num_layers=1))
    log_dir = tmp_path / "results"
    message = error(capsys, model, wide, f"logger.log_dir={log_dir}")
    assert "are different models: head_dim (16 and 8) differs" in message
    assert message.count("\n") == 1  # one sentence
    assert not log_dir.exists()


def test_another_tokenizer_is_refused(model, capsys, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isdigit()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    assert "the vocabulary of the tokenizer differs" in error(capsys, model, other)


def test_another_end_of_sequence_token_is_refused(model, capsys, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert "eos_token_id of generation_config.json differs" in error(capsys, model, other)


def test_weights_of_another_model_are_refused(model, capsys, tmp_path):
    wide = save_model(tmp_path / "wide", EmbeddedModelConfig(hidden_size=64, num_layers=1))
    shutil.copy(wide / "model.safetensors", Path(model) / "model.safetensors")
    assert "are of another model: model.embed_tokens.weight has the shape" in error(capsys, model)


def test_trained_model_fits_the_embedded_one(tmp_path):
    saved = tmp_path / "trained"
    make_model(EmbeddedModelConfig(), make_tokenizer()).save_pretrained(saved)
    make_tokenizer().save_pretrained(saved)
    config = EvalConfig(eval={"models": [str(saved), "embedded"]})
    assert check_models(config).shapes


def inputs_of(config: EvalConfig, tmp_path: Path):
    problems = load_problems(config)
    models = check_models(config)
    run = open_run_directory(config, "eval", tmp_path)
    run.close()
    return prepare_inputs(config, problems, models.files, run.started)


def test_subject_key_that_no_problem_has(model, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"problem": "1+1", "answer": "2", "topic": "sums"}\n')
    config = EvalConfig(
        eval={"models": [model], "subject_key": "topics"},
        data={"train": {"path": str(data)}, "validation": {"path": str(data)}},
    )
    with pytest.raises(ConfigError, match=r"eval.subject_key=topics: no problem has this field; did you mean 'topic'"):
        inputs_of(config, tmp_path)


def test_train_problems_are_not_read(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"problem": "1+1", "answer": "2"}\n')
    config = EvalConfig(data={"train": {"path": "missing.jsonl"}, "validation": {"path": str(data)}})
    assert len(load_problems(config)["math"]) == 1


def test_number_of_problems_is_divided_among_the_environments(model, tmp_path):
    config = load_config(
        EvalConfig,
        None,
        [
            f"eval.models=[{model}]",
            "eval.max_num_problems=10",
            "data.train.kind=seeds",
            "env.a.class=nemo_rl.environments.games.GuessNumber",
            "env.b.class=nemo_rl.environments.games.GuessNumber",
            "env.a.max_turns=1",
            "env.b.max_turns=1",
        ],
    )
    assert inputs_of(config, tmp_path).batch["environment"] == ["a"] * 5 + ["b"] * 5


def test_dry_run_starts_nothing(model, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert eval_job.main([model, "--dry-run", "eval.num_generations=4"]) == 0
    output = capsys.readouterr().out
    assert "nemo_rl.models.generation.torch.torch_generation_worker" in output
    assert "4 completions per problem" in output
    assert not (tmp_path / "results").exists()


def test_help_lists_models_and_keys(capsys):
    with pytest.raises(SystemExit):
        eval_job.main(["--help"], program="nemo-rl eval")
    output = capsys.readouterr().out
    assert "usage: nemo-rl eval MODEL [MODEL ...]" in output
    assert "eval.num_generations" in output
