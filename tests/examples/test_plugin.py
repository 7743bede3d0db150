"""Installs the example plugin like a user and uses it by name from another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the plugin as a wheel, with metadata, into a directory for sys.path."""
    from nemo_rl.venvs.uv import find_uv

    folder = tmp_path_factory.mktemp("site")
    command = [find_uv(), "pip", "install", "--no-deps", "examples/plugin", "--quiet", "--target", str(folder)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    subprocess.run([*command, "--python", sys.executable], check=True, env=env, cwd=REPOSITORY)
    return folder


def run(site: Path, program: str, *arguments: str, cwd: Path | None = None, **env: str) -> str:
    path = os.pathsep.join((str(site), str(REPOSITORY)))
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_environment_is_found_by_name_and_grades(site: Path) -> None:
    program = """
import importlib, sys
from nemo_rl.distributed.ray_actor_environment_registry import get_actor_python_env
from nemo_rl.environments.registry import environment_fqn
fqn = environment_fqn("reverse")
assert "nemo_rl_plugin.reverse_environment" not in sys.modules, "the driver must not import the environment"
assert get_actor_python_env(fqn) == sys.executable
module, _, name = fqn.rpartition(".")
environment = getattr(importlib.import_module(module), name)()
result, metrics = environment.global_post_process_and_metrics(
    environment.step(["cba", "abc", " "], [{"word": "abc"}] * 3))
print(result.rewards.tolist(), result.status, round(metrics["accuracy"], 2))
"""
    assert run(site, program) == "[1.0, 0.0, 0.0] ['ok', 'ok', 'unparseable'] 0.33\n"


def test_words_are_reproducible_and_disjoint(site: Path) -> None:
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


def run_script(site: Path, script: str, *arguments: str, cwd: Path | None = None, **env: str) -> str:
    """Run a script of the repository in another process, and return its standard output."""
    command = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return run(site, command, str(REPOSITORY / script), *arguments, cwd=cwd, RAY_ADDRESS="local", **env)


@pytest.mark.slow
def test_stage_runs_in_a_venv_with_its_package(site: Path, tmp_path: Path) -> None:
    texts = ["a long sentence", "  ", "日本 語 x"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ("examples/plugin/run_shorten.py", "texts.jsonl", "shortened")
    output = run_script(site, *command, cwd=tmp_path, NEMO_RL_VENV_DIR=str(tmp_path / "venvs"))
    assert "Python: {'uv': ['wcwidth" in output
    (written,) = (tmp_path / "shortened").glob("*.jsonl")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert rows == [{"text": "a long", "width": 6}, {"text": "日本 語", "width": 7}]


@pytest.mark.slow
def test_worker_runs_in_a_venv_with_its_package(site: Path, tmp_path: Path) -> None:
    output = run_script(site, "examples/plugin/run_distance.py", NEMO_RL_VENV_DIR=str(tmp_path / "venvs"))
    assert output.endswith("[3, 2]\n")
    command_line = "import sys; from nemo_rl.cli import main; sys.argv[0] = 'nemo-rl'; main()"
    why = ["venvs", "why", "nemo_rl_plugin.distance_worker.DistanceWorker", "rapidfuzz"]
    assert "gets rapidfuzz 3.14.1" in run(site, command_line, *why, NEMO_RL_VENV_DIR=str(tmp_path / "venvs"))


def assert_trains(site: Path, run_dir: Path, command: list[str]) -> None:
    run_script(site, *command, f"logger.log_dir={run_dir}")
    workers = json.loads((run_dir / "attestation.json").read_text())
    assert "nemo_rl_plugin.reverse_environment.ReverseEnvironment" in {worker["fqn"] for worker in workers}
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in records if "train/loss" in record) == 2


@pytest.mark.slow
def test_job_validates_with_the_reverse_environment(site: Path, tmp_path: Path) -> None:
    command = [
        "examples/run_grpo_math.py",
        "env.name=reverse",
        "data.train.kind=nemo_rl_plugin.words_dataset:WordsDataset",
        "data.validation.kind=nemo_rl_plugin.words_dataset:WordsDataset",
        "grpo.max_num_steps=2",
        "grpo.num_prompts_per_step=16",
        "grpo.validation.max_num_problems=16",
    ]
    assert_trains(site, tmp_path / "run", command)


@pytest.mark.slow
def test_job_trains_on_the_words_dataset(site: Path, tmp_path: Path) -> None:
    command = [
        "examples/run_grpo_math.py",
        "env.name=reverse",
        "data.train.kind=nemo_rl_plugin.words_dataset:WordsDataset",
        "grpo.max_num_steps=2",
        "grpo.num_prompts_per_step=16",
    ]
    assert_trains(site, tmp_path / "run", command)


def test_plugin_names_are_unknown_without_the_plugin() -> None:
    program = """
from nemo_rl.environments.registry import environment_fqn
from nemo_rl.errors import ConfigError
try: environment_fqn("reverse")
except ConfigError as error: print(error)
"""
    assert "'nemo_rl.environments'" in run(REPOSITORY, program)
