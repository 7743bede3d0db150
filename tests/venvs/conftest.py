from __future__ import annotations

from pathlib import Path

import pytest
from sample_projects import Project, make_wheel

from nemo_rl.venvs import Store


@pytest.fixture(scope="session")
def project_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose wheels all projects of these tests use."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in ("alpha", "gamma", "delta"):
        for version in ("1.0", "2.0"):
            make_wheel(folder, name, version)
    for version in ("1.0", "2.0"):
        make_wheel(folder, "beta", version, requires=("gamma",))
    make_wheel(folder, "epsilon", "1.0")
    return folder


@pytest.fixture
def project(tmp_path: Path, project_template: Path) -> Project:
    project = Project(tmp_path / "sample", project_template)
    package = project.root / "src" / "sample"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("CODE = 1\n")
    project.lock()
    return project


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, which is the default store."""
    root = tmp_path / "venvs"
    monkeypatch.setenv("NEMO_RL_VENV_DIR", str(root))
    for name in ("NRL_FORCE_REBUILD_VENVS", "NEMO_RL_COMPILE_BYTECODE", "VIRTUAL_ENV", "UV_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    return Store(root)
