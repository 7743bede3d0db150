"""Compares forecasts of venv builds with the builds. Uses real uv without network."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "venvs"))
from sample_projects import make_wheel, uv

from nemo_rl import venvs
from nemo_rl.jobs.venv_forecast import BUILT, IGNORED, READY, REFUSED, VenvForecast, forecast_venvs, wheel_sizes_of


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the py_executable of a locked project with one package, with an empty venv store."""
    wheels, project = tmp_path / "wheels", tmp_path / "project"
    make_wheel(wheels, "alpha", "1.0", num_modules=20)
    project.mkdir()
    (project / "pyproject.toml").write_text(
        '[project]\nname = "p"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["alpha"]\n'
        f'[tool.uv]\npackage = false\nno-index = true\nfind-links = ["{wheels}"]\n'
    )
    uv("lock", cwd=project)
    monkeypatch.setenv("NEMO_RL_VENV_DIR", str(tmp_path / "venvs"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    return f"uv run --locked --project {project}"


def forecast(command: str, sizes: dict[str, int] | None = None) -> VenvForecast:
    (result,) = forecast_venvs({"worker": venvs.plan(command)}, sizes or {}, {})
    return result


def test_forecast_equals_the_build(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = forecast(command)
    assert (before.state, before.num_unknown) == (BUILT, 1), "the size of this package is unknown"
    manifest = venvs.ensure(command, "worker").manifest
    after = forecast(command)
    assert (after.state, after.seconds, after.download_bytes) == (READY, 0.0, 0)
    monkeypatch.setenv("NRL_FORCE_REBUILD_VENVS", "1")
    again = forecast(command)
    assert manifest is not None
    assert again.state == BUILT
    assert 0 < again.installed_bytes <= manifest.num_bytes
    assert (again.download_bytes, again.num_cached, again.num_unknown) == (0, 1, 0)
    assert again.seconds == pytest.approx(sum(s for p, s in manifest.seconds.items() if p != "fetch"), abs=0.06)
    assert again.basis == f"the build of {manifest.built_at[:16]} on this node"


def test_only_missing_packages_are_downloaded(command: str, tmp_path: Path) -> None:
    sizes = {"alpha==1.0": 1_000_000}
    assert forecast(command, sizes).download_bytes == 1_000_000
    venvs.ensure(command, "worker")
    shutil.rmtree(tmp_path / "venvs")
    cached = forecast(command, sizes)
    assert (cached.state, cached.download_bytes, cached.num_cached) == (BUILT, 0, 1)
    assert cached.installed_bytes > 10_000
    assert "measured on two cores" in cached.basis, "the store has no earlier build"


@pytest.mark.parametrize(("policy", "state"), [("refuse", REFUSED), ("ignore", IGNORED), ("rebuild", BUILT)])
def test_drift_policy_sets_the_state(
    command: str, policy: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venvs.ensure(command, "worker")
    pyproject = tmp_path / "project" / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('dependencies = ["alpha"]', "dependencies = []"))
    uv("lock", cwd=tmp_path / "project")
    monkeypatch.setenv("NEMO_RL_VENV_DRIFT", policy)
    assert forecast(command).state == state


def test_overlay_follows_its_base_venv(command: str) -> None:
    plan = venvs.plan(f"{command} --with alpha==1.0")
    forecasts = forecast_venvs({"worker": plan}, {}, {})
    assert plan.base is not None
    assert [venv.digest for venv in forecasts] == [plan.base.digest, plan.digest]
    assert [venv.state for venv in forecasts] == [BUILT, BUILT]


def test_lock_sizes_are_those_of_the_best_wheel(command: str, tmp_path: Path) -> None:
    plan = venvs.plan(command)
    assert wheel_sizes_of([plan]) == {}, "uv writes only sizes that the index reports"
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    machine = "x86_64" if "x86_64" in plan.python.platform else "aarch64"
    (tmp_path / "project" / "uv.lock").write_text(
        'version = 1\n[[package]]\nname = "alpha"\nversion = "1.0"\nwheels = [\n'
        '  { url = "https://x/alpha-1.0-py3-none-any.whl", size = 1 },\n'
        f'  {{ url = "https://x/alpha-1.0-{tag}-{tag}-manylinux_2_17_{machine}.whl", size = 20 }},\n'
        '  { url = "https://x/alpha-1.0-cp27-cp27m-win32.whl", size = 300 },\n]\n'
    )
    assert wheel_sizes_of([plan]) == {"alpha==1.0": 20}
