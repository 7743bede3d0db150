"""Runs `nemo-rl env` on environments in child processes of this Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parent.parent / "venvs"))
from sample_projects import lock_project_without_ray

from nemo_rl.cli.app import app
from nemo_rl.errors import ConfigError, EnvironmentFailure, IncompatibleVenvError, UnknownExtraError, VenvError

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
GUESS = "env_games.Guess"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(HERE)  # a child gets the source directories of its parent
    monkeypatch.setenv("NEMO_RL_VENV_DIR", str(tmp_path / "venvs"))


def env(*arguments: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, ["env", *arguments], input=typed)


def shell(line: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line in which `env` stands for `nemo-rl env`."""
    variables = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{HERE}", "NEMO_RL_VENV_DIR": str(tmp_path / "venvs")}
    line = line.replace("env ", f"{sys.executable} -m nemo_rl.cli env ")
    return subprocess.run(["bash", "-c", line], env=variables, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Write a configuration with two environments, one with its own data."""
    (tmp_path / "sums.jsonl").write_text(
        '{"problem": "1 + 1 =", "answer": "2"}\n{"problem": "2 + 2 =", "answer": "4"}\n'
    )
    path = tmp_path / "job.yaml"
    path.write_text(
        f"""
env:
  guess: {{class: {GUESS}, config: {{high: 3}}, max_turns: 6}}
  sums:
    class: env_games.same
    data: {{train: {{path: {tmp_path}/sums.jsonl}}}}
    py_executable: uv run --locked --project {tmp_path}/none
"""
    )
    return str(path)


def test_list_shows_registered_and_configured_environments(config: str) -> None:
    records = {each["name"]: each for each in json.loads(env("list", "--config", config, "--json").output)}
    assert records.keys() == {"judge", "math", "reward_model", "guess", "sums"}
    assert {records[name]["source"] for name in ("judge", "math", "reward_model")} == {"registered"}
    guess = {"name": "guess", "class": GUESS, "python": "the driver's", "state": "interpreter"}
    assert records["guess"] == {**guess, "source": "configuration"}
    assert records["sums"]["state"].startswith("cannot be resolved: ")
    table = env("list").output.splitlines()
    assert table[0].split() == ["name", "class", "source", "python", "state"]
    assert table[-1].split()[:2] == ["math", "nemo_rl.environments.math_environment.MathEnvironment"]


def test_check_accepts_a_right_environment(config: str) -> None:
    done = env("check", "guess", "env.guess.config.high=4", "--config", config, "-n", "2")
    assert done.exit_code == 0, done.output
    assert "Game 1: guess my number from 0 to 4." in done.stdout
    assert done.stdout.endswith("\nno errors\n")


def test_check_plays_the_problems_of_the_data(config: str) -> None:
    done = env("check", "sums", "env.sums.py_executable=null", "--config", config, "--action", "4", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [episode["reward"] for episode in report["episodes"]] == [0.0, 1.0]
    assert (report["errors"], report["class"]) == ([], "env_games.same")


def test_check_of_a_registered_environment() -> None:
    report = json.loads(env("check", "math", "max_turns=1", "-n", "1", "--json").stdout)
    assert [(episode["end"], episode["failure"]) for episode in report["episodes"]] == [("done", None)]


def test_check_of_a_wrong_environment_ends_with_1() -> None:
    done = env("check", "env_games.Endless", "max_turns=2")
    assert done.exit_code == 1
    assert "error: no episode ended within max_turns=2 actions" in done.stdout


def test_death_of_the_environment_is_an_error() -> None:
    done = env("check", "env_games.Dies")
    assert done.exit_code == 1
    assert "ended with exit code 3" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        (["maths"], ConfigError, "Did you mean 'math'"),
        (["env_games.Gues"], EnvironmentFailure, "has no 'Gues'. Its classes: "),
        (
            ["env_games.NoStep"],
            EnvironmentFailure,
            "TypeError: env_games.NoStep is no environment: it has no method st",
        ),
        (["no_such_package.Game"], EnvironmentFailure, "No module named 'no_such_package'. Add its package to the Pyt"),
        ([GUESS, "max_turn=3"], ConfigError, "max_turns"),
        ([GUESS, "py_executable=uv run --extra no-such-extra"], UnknownExtraError, "no-such-extra"),
        (
            ["reward_model", "config={model: ./none}"],
            ConfigError,
            "reward_model.config.model: there is no directory ./n",
        ),
        ([GUESS, "runtime_env={conda: x}"], ConfigError, "Ray creates this Python when a job starts"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], error: type[Exception], expected: str) -> None:
    done = env("check", *arguments)
    assert isinstance(done.exception, error), done.exception
    assert expected in str(done.exception)
    assert "Traceback" not in str(done.exception)


def test_unknown_name_of_a_configuration_names_the_nearest(config: str) -> None:
    done = env("try", "gues", "--config", config)
    assert str(done.exception) == f"{config} has no environment 'gues' in its section env; did you mean 'guess'?"


def test_variables_of_the_runtime_env_reach_the_environment() -> None:
    done = env("try", "env_games.Variable", "runtime_env={env_vars: {GAME: chess}}", "--action", "")
    assert "[user] chess" in done.stdout, done.exception


def test_other_python_needs_its_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_rl.venvs import DriverVersions

    monkeypatch.setattr(DriverVersions, "of_this_process", lambda: DriverVersions("3.99.0", None))
    done = env("check", GUESS)
    assert isinstance(done.exception, IncompatibleVenvError)
    assert str(done.exception).endswith(
        f"Or set own_process=true for {GUESS}: then its code runs in a child process of its workers."
    )
    assert env("check", GUESS, "own_process=true").exit_code == 0


def test_venv_without_ray_is_built_for_a_child_process(tmp_path: Path) -> None:
    project = lock_project_without_ray(tmp_path)
    arguments = ["check", "env_games.NeedsAlpha", f"py_executable=uv run --locked --project {project}"]
    done = env(*arguments)
    assert isinstance(done.exception, VenvError)
    assert "has no ray, which its workers need. Add ray. Or set own_process=true" in str(done.exception)
    done = env(*arguments, "own_process=true", "-n", "1", "--json")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["python"].endswith("/environment-env_games.NeedsAlpha/bin/python")


def test_try_plays_typed_actions(tmp_path: Path) -> None:
    done = shell(f"printf 'up\\n6\\n' | env try {GUESS}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "[user] Game 0: guess my number from 0 to 9.",
        '[tool] {"name": "guess"}',
        "> up",
        "[user] too low",
        "reward 0",
        "> 6",
        "reward 1  won=1",
        "",
        "the episode ended after 2 turns: total reward 1",
    ]


def test_try_with_closed_standard_input(tmp_path: Path) -> None:
    done = shell(f"env try {GUESS} <&-", tmp_path)
    assert done.returncode == 2
    assert done.stderr == ("nemo-rl: standard input is closed; give the actions with --action TEXT or --script FILE\n")


def test_try_reports_actions_that_end_too_early() -> None:
    done = env("try", GUESS, typed="1\n")
    assert done.exit_code == 1
    assert done.stdout.endswith("stopped after 1 turn: total reward 0\n")
    assert done.stderr == "nemo-rl: the actions ended after 1 turn, before the episode did\n"


def test_try_plays_a_script_on_a_problem(tmp_path: Path) -> None:
    script = tmp_path / "actions.txt"
    script.write_text("5\n0\n")
    record = json.loads(env("try", GUESS, "--seed", "2", "--script", str(script), "--json").stdout)
    assert (record["rewards"], record["end"], record["problem"]) == ([0.0, 1.0], "done", 2)
    assert [message["role"] for message in record["messages"]] == ["user", "assistant", "user", "assistant"]
    both = env("try", GUESS, "--script", str(script), "--action", "5")
    assert "--action and --script cannot be combined" in str(both.exception)


def test_try_stops_at_max_turns(config: str) -> None:
    done = env("try", "guess", "env.guess.max_turns=1", "--config", config, "--action", "9")
    assert done.stdout.endswith("the episode was cut off by max_turns=1 after 1 turn: total reward 0\n")


def test_try_of_a_problem_that_does_not_exist(config: str) -> None:
    done = env("try", "sums", "env.sums.py_executable=null", "--config", config, "--seed", "2")
    assert str(done.exception) == "there is no problem 2: the data set has the problems 0 to 1"


def test_try_reports_a_failure_of_the_environment() -> None:
    done = env("try", "env_games.Strict", "--action", "six")
    assert isinstance(done.exception, EnvironmentFailure)
    assert "for the action 'six'" in str(done.exception)
