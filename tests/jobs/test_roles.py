"""Tests the venvs of a job's roles, and the checks of extras and of the weight transport before a job starts."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "venvs"))
from sample_projects import lock_project_without_ray

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES
from nemo_rl.distributed.workers.runtime_env_fields import named_spec
from nemo_rl.environments.registry import WORKER_FQN
from nemo_rl.errors import ConfigError, IncompatibleVenvError, UnknownExtraError, VenvError
from nemo_rl.jobs.plan import make_plan
from nemo_rl.jobs.roles import job_roles, role_plans
from nemo_rl.jobs.weight_route import check_weight_route
from nemo_rl.utils.config import load_config
from nemo_rl.venvs import list_venvs


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["policy.weight_transport=nccll"], "policy.weight_transport: unknown .* Did you mean 'nccl'"),
        (["policy.weight_transport=nccl"], "weight_transport=nccl is for workers on GPUs"),
        (
            ["policy.weight_transport=nccl", "cluster.gpus_per_node=2"],
            "for generation on separate GPUs, and here it shares the policy",
        ),
        (
            ["policy.weight_transport=cuda_ipc", "cluster={gpus_per_node: 1, generation: {gpus_per_node: 1}}"],
            "cuda_ipc is for generation on the policy's GPUs, and here it has separate GPUs",
        ),
        (["policy.weight_transport=shared_memory", "cluster.num_nodes=2"], "here they are on several"),
    ],
)
def test_unreachable_transport_is_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_weight_route(load_config(MasterConfig, None, overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["policy.weight_transport=ray", "cluster.num_nodes=2"],
        ["policy.weight_transport=gloo"],
        ["policy.weight_transport=cuda_ipc", "cluster.gpus_per_node=2"],
        ["policy.weight_transport=nccl", "cluster={gpus_per_node: 1, generation: {gpus_per_node: 1}}"],
    ],
)
def test_reachable_transport_is_accepted(overrides: list[str]) -> None:
    check_weight_route(load_config(MasterConfig, None, overrides))


def test_project_without_the_extra_of_a_role_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "mine"\nversion = "1"\n')
    monkeypatch.setenv("NEMO_RL_PROJECT_ROOT", str(tmp_path))
    assert len(job_roles(load_config(MasterConfig))) == 3
    with pytest.raises(UnknownExtraError, match=r"no extra 'mcore'\. Run `nemo-rl add mcore`"):
        job_roles(load_config(MasterConfig, None, ["policy.backend=megatron"]))


GAME = "nemo_rl.environments.games.GuessNumber"


@pytest.fixture
def overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a job whose environments need the driver's Python, packages on top of it, and a project without ray."""
    monkeypatch.setenv("NEMO_RL_VENV_DIR", str(tmp_path / "venvs"))
    monkeypatch.setenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", "1")  # of policy and generation
    project = lock_project_without_ray(tmp_path)
    [wheel] = (tmp_path / "wheels").iterdir()
    return [
        *(f"env.{name}.class={GAME}" for name in ("plain", "twin", "added", "child")),
        f"env.added.runtime_env={{uv: ['alpha @ {wheel.as_uri()}']}}",
        f"env.child.py_executable=uv run --project {project}",
        "env.child.own_process=true",
    ]


def test_venvs_of_environments_are_planned_under_the_names_of_their_workers(overrides: list[str]) -> None:
    config = load_config(MasterConfig, None, overrides)
    roles = {role.name: role for role in job_roles(config)}
    plans = role_plans(list(roles.values()))
    system = PY_EXECUTABLES.SYSTEM
    added = {"py_executable": system, **(config.env.entries()["added"].runtime_env or {})}
    assert roles["environment plain"].venv == roles["environment twin"].venv
    assert roles["environment added"].venv == named_spec(WORKER_FQN, added)[0]
    child_fields = {"py_executable": config.env.entries()["child"].py_executable}
    assert roles["environment child"].venv == named_spec(GAME, child_fields)[0]
    packages = {name: [str(package) for package in plans[role.venv].packages] for name, role in roles.items()}
    assert packages["environment child"] == ["alpha==1.0"]
    assert len(packages["environment added"]) == 1
    assert plans[roles["environment plain"].venv].is_interpreter
    assert list_venvs() == []

    states = {tuple(venv.roles): venv for venv in make_plan(config).venvs}
    expected = {
        ("policy", "generation", "environment plain", "environment twin"): "interpreter",
        ("environment added",): "would be built",
        ("environment child (child process)",): "would be built",
    }
    assert {names: venv.state for names, venv in states.items()} == expected


@pytest.mark.parametrize(
    ("override", "error", "expected"),
    [
        (
            "env.child.own_process=false",
            VenvError,
            "the venv of env.child .* has no ray.* own_process=true",
        ),
        ("env.added.runtime_env={uv: [no-such==9]}", VenvError, "env.added: uv finds no versions of no-such==9 for"),
        ("env.twin.py_executable=uv run --extra nope", UnknownExtraError, "env.twin: .* has no extra 'nope'"),
        ("env.twin.py_executable=uv rnu", VenvError, "env.twin: py_executable 'uv rnu' is neither"),
        (
            "env.twin.class=nemo_rl.environments.games.Guess",
            ConfigError,
            r"games.py has no 'Guess'. Did you mean 'Gues",
        ),
        ("env.twin.config.high=3", ConfigError, r"env.twin.config.high: GuessNumber has no argument 'high'"),
        ("env.twin.runtime_env={conda: a, pip: [b]}", VenvError, "env.twin.runtime_env: 'conda' and 'pip' cannot both"),
    ],
)
def test_python_that_an_environment_cannot_have_is_named_before_the_start(
    overrides: list[str], override: str, error: type[Exception], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_NO_INDEX", "1")
    with pytest.raises(error, match=expected) as raised:
        make_plan(load_config(MasterConfig, None, [*overrides, override]))
    assert "\n" not in str(raised.value)


def test_other_python_needs_its_own_process(overrides: list[str], tmp_path: Path) -> None:
    python = tmp_path / "python"  # this Python, which says that it is an older one
    version = platform.python_version()
    python.write_text(f'#!/bin/sh\n{sys.executable} "$@" | sed s/{version}/3.9.1/g\n')
    python.chmod(0o755)
    overrides += [f"env.twin.py_executable={python}"]
    with pytest.raises(IncompatibleVenvError, match=r"env.twin: .* Or set own_process=true for env.twin"):
        role_plans(job_roles(load_config(MasterConfig, None, overrides)))
    with pytest.raises(IncompatibleVenvError, match=r"is 3.9.1, and environments need at least 3.10"):
        role_plans(job_roles(load_config(MasterConfig, None, [*overrides, "env.twin.own_process=true"])))
