"""The section `env`: one environment by name, or several with turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES
from nemo_rl.environments.config import EnvironmentConfig, EnvironmentEntry
from nemo_rl.environments.registry import entry_fqn, python_fields
from nemo_rl.errors import ConfigError, RuntimeEnvError
from nemo_rl.utils.config import dump_yaml, load_config

NIM = "env.nim.class=my_package.games.Nim"


def entries(*overrides: str) -> dict[str, EnvironmentEntry]:
    return load_config(MasterConfig, overrides=overrides).env.entries()


def test_job_without_named_environments_has_none() -> None:
    assert entries() == {}
    assert entries("env.math.timeout_s=2", "env.name=other", "env.options.x=1") == {}


def test_named_environments() -> None:
    nim = entries(NIM, "env.nim.config.piles=3", "env.nim.max_turns=4", "env.nim.data.train.kind=seeds")["nim"]
    assert nim.class_ == "my_package.games.Nim"
    assert nim.config == {"piles": 3}
    assert nim.max_turns == 4
    assert nim.data.train.kind == "seeds"


def test_math_is_one_of_them_if_it_has_a_weight() -> None:
    assert list(entries(NIM, "env.math.timeout_s=2")) == ["nim"]
    found = entries(NIM, "env.math.timeout_s=2", "env.math.weight=3")
    assert list(found) == ["math", "nim"]
    assert found["math"].weight == 3
    assert found["math"].config["config"].timeout_s == 2
    assert entry_fqn(found["math"]) == "nemo_rl.environments.math_environment.MathEnvironment"


def test_weights_follow_a_schedule() -> None:
    weight = entries(NIM, "env.nim.weight={11: 1.0, 1: 0.0, 21: 0.5}")["nim"].weight_at
    assert [weight(step) for step in (0, 1, 6, 11, 16, 21, 99)] == [0.0, 0.0, 0.5, 1.0, 0.75, 0.5, 0.5]


def test_configuration_is_read_back(tmp_path: Path) -> None:
    config = load_config(MasterConfig, overrides=[NIM, "env.math.weight=1", "env.nim.weight={1: 0.0, 5: 2.0}"])
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_config(MasterConfig, tmp_path / "config.yaml") == config


def test_python_of_an_environment() -> None:
    def python(**options: Any) -> dict[str, Any]:
        return python_fields("env.nim", "my_package.games.Nim", **options)

    driver = {"py_executable": PY_EXECUTABLES.SYSTEM}
    assert python() == driver
    assert python(py_executable="uv run --extra x", own_process=True) == {"py_executable": "uv run --extra x"}
    assert python(runtime_env={"uv": ["a"]}) == {"uv": ["a"], **driver}
    assert python(runtime_env={"py_executable": "/python"}) == {"py_executable": "/python"}
    assert python(runtime_env={"conda": "base"}) == {"conda": "base"}
    with pytest.raises(RuntimeEnvError, match=r"env.nim runs in a child process.* py_executable instead of conda"):
        python(runtime_env={"conda": "base"}, own_process=True)
    with pytest.raises(RuntimeEnvError, match=r"env.nim.runtime_env has an unknown field 'uvv'. Did you mean 'uv'"):
        python(runtime_env={"uvv": ["a"]})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([NIM, "env.nim.wieght=2"], r"unknown key env.nim.wieght; did you mean env.nim.weight\?"),
        ([NIM, "env.nim.weight=-1"], r"env.nim.weight: a weight is a finite number of at least 0.*got -1"),
        ([NIM, "env.nim.weight=0"], r"no environment has a weight above 0"),
        (["env.mth.timeout_s=2"], r"env.mth: an environment needs the key class. Did you mean 'math'"),
        (["env.nim.weight=2"], r"env.nim: an environment needs the key class"),
        (["env.nim=2"], r"env.nim: an environment needs the key class"),
        ([NIM, "env.nim.max_turns=0"], r"env.nim.max_turns: input should be greater than or equal to 1, got 0"),
        ([NIM, "env.name=reverse"], r"env.name=reverse is for a job with one .* write env.reverse.class=reverse"),
        (["grpo.advantage.level=turn"], r"level=turn needs environments with turns"),
        ([NIM, "grpo.overlong_penalty.factor=1"], r"overlong_penalty is for completions with one turn"),
        (["env.2x.class=a.B"], r"env.2x: the name of an environment consists of letters"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(MasterConfig, overrides=overrides)


def test_unknown_name_of_a_class() -> None:
    with pytest.raises(ConfigError, match=r"Unknown environment 'mth'. Did you mean 'math'\?"):
        entry_fqn(EnvironmentEntry(class_="mth"))


def test_entries_can_be_made_in_python() -> None:
    config = EnvironmentConfig(nim={"class": "my_package.games.Nim"}, go=EnvironmentEntry(class_="my_package.Go"))
    assert list(config.entries()) == ["nim", "go"]
