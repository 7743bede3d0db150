"""The example plugin, installed as users install one and used by a process that knows only its names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PLUGIN = REPOSITORY / "examples" / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for sys.path with the plugin as a wheel installs it: metadata and all."""
    from nemo_rl.venvs.uv import find_uv

    folder = tmp_path_factory.mktemp("site")
    command = [find_uv(), "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(PLUGIN)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    subprocess.run([*command, "--python", sys.executable], check=True, env=env)
    return folder


def run(site: Path, program: str, *arguments: str, **env: str) -> str:
    path = os.pathsep.join((str(site), str(REPOSITORY)))
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_environment_is_known_by_name_and_judges(site: Path) -> None:
    program = """
import importlib, sys
from nemo_rl.distributed.ray_actor_environment_registry import get_actor_python_env
from nemo_rl.environments.registry import environment_fqn
fqn = environment_fqn("reverse")
assert "nemo_rl_plugin.reverse_environment" not in sys.modules, "the driver imports no environment"
assert get_actor_python_env(fqn) == sys.executable
module, _, name = fqn.rpartition(".")
environment = getattr(importlib.import_module(module), name)()
result, metrics = environment.global_post_process_and_metrics(
    environment.step(["cba", "abc", " "], [{"word": "abc"}] * 3))
print(result.rewards.tolist(), result.status, round(metrics["accuracy"], 2))
"""
    assert run(site, program) == "[1.0, 0.0, 0.0] ['ok', 'ok', 'unparseable'] 0.33\n"


def test_train_and_validation_words_are_the_same_ever_after_and_never_shared(site: Path) -> None:
    program = """
from nemo_rl.data.config import DataConfig
from nemo_rl.data.datasets import open_dataset
from nemo_rl.errors import DataError
data = DataConfig.model_validate({"train": {"kind": "nemo_rl_plugin.words_dataset:WordsDataset"}})
train, again = (open_dataset(data.train, data, "train") for _ in range(2))
assert list(train) == list(again)
held_out = open_dataset(data.train, data, "validation")
assert not {problem.prompt for problem in train} & {problem.prompt for problem in held_out}
assert all(problem.answer == problem.metadata["word"][::-1] for problem in train)
try: open_dataset(data.train.model_copy(update={"max_num_problems": 10**6}), data, "train")
except DataError as error: print(len(train), len(held_out), error)
"""
    assert run(site, program) == "8742 1248 data.train.max_num_problems=1000000: there are only 8742 words\n"


def run_script(site: Path, script: str, *arguments: str, **env: str) -> str:
    command = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return run(site, command, str(REPOSITORY / "examples" / script), *arguments, RAY_ADDRESS="local", **env)


@pytest.mark.slow
def test_the_stage_runs_in_a_pipeline_in_a_venv_that_has_its_package(site: Path, tmp_path: Path) -> None:
    texts = ["a long sentence", "  ", "日本 語 x"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source, target = str(tmp_path / "texts.jsonl"), str(tmp_path / "shortened")
    told = run_script(site, "plugin/run_shorten.py", source, target, NEMO_RL_VENV_DIR=str(tmp_path / "venvs"))
    assert "Python: {'uv': ['wcwidth" in told
    (written,) = (tmp_path / "shortened").glob("*.jsonl")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert rows == [{"text": "a long", "width": 6}, {"text": "日本 語", "width": 7}]


@pytest.mark.slow
def test_the_worker_runs_on_ray_in_a_venv_that_has_its_package(site: Path, tmp_path: Path) -> None:
    told = run_script(site, "plugin/run_distance.py", NEMO_RL_VENV_DIR=str(tmp_path / "venvs"))
    assert told.endswith("[3, 2]\n")
    command_line = "import sys; from nemo_rl.cli import main; sys.argv[0] = 'nemo-rl'; main()"
    why = ["venvs", "why", "nemo_rl_plugin.distance_worker.DistanceWorker", "rapidfuzz"]
    assert "gets rapidfuzz 3.14.1" in run(site, command_line, *why, NEMO_RL_VENV_DIR=str(tmp_path / "venvs"))


@pytest.mark.slow
def test_a_job_trains_on_the_data_set_and_the_environment(site: Path, tmp_path: Path) -> None:
    kind = "nemo_rl_plugin.words_dataset:WordsDataset"
    arguments = ["env.name=reverse", f"data.train.kind={kind}", f"data.validation.kind={kind}", "grpo.max_num_steps=2"]
    arguments += ["grpo.num_prompts_per_step=16", "grpo.validation.max_num_problems=16"]
    run_script(site, "run_grpo_math.py", *arguments, f"logger.log_dir={tmp_path / 'run'}")
    workers = json.loads((tmp_path / "run" / "attestation.json").read_text())
    assert "nemo_rl_plugin.reverse_environment.ReverseEnvironment" in {worker["fqn"] for worker in workers}
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in records if "train/loss" in record) == 2


def test_without_the_plugin_its_names_are_unknown() -> None:
    program = """
from nemo_rl.environments.registry import environment_fqn
from nemo_rl.errors import ConfigError
try: environment_fqn("reverse")
except ConfigError as error: print(error)
"""
    assert "'nemo_rl.environments'" in run(REPOSITORY, program)
