"""Secrets among environment variables, and variables that the driver forwards to workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rl import settings
from nemo_rl.errors import ConfigError


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "hf_token",
        "MY_PASSWORD",
        "OPENAI_APIKEY",
        "SSH_PRIVATE_KEY",
    ],
)
def test_is_secret(name: str) -> None:
    assert settings.is_secret(name)
    assert settings.masked({name: "value"}) == {name: settings.MASK}


@pytest.mark.parametrize(
    "name",
    ["TOKENIZERS_PARALLELISM", "VLLM_MAX_TOKENS", "HF_HOME", "NCCL_DEBUG", "MONKEY", "KEYBOARD", "HF_DATASETS_CACHE"],
)
def test_is_secret_rejects_similar_names(name: str) -> None:
    assert not settings.is_secret(name)
    assert settings.masked({name: "value"}) == {name: "value"}


def test_only_documented_variables_are_forwarded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "NCCL_DEBUG", "LD_LIBRARY_PATH", "MY_VARIABLE", "PYTHONPATH", "VIRTUAL_ENV", "RANK"):
        monkeypatch.setenv(name, "x")
    forwarded = settings.forwarded()
    assert {"HF_HOME", "NCCL_DEBUG", "LD_LIBRARY_PATH"} <= forwarded.keys()
    assert forwarded.keys().isdisjoint({"MY_VARIABLE", "PYTHONPATH", "VIRTUAL_ENV", "RANK"})


def test_cache_dir_without_home_requires_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_account(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_account)
    monkeypatch.delenv("NEMO_RL_CACHE_DIR", raising=False)
    with pytest.raises(ConfigError, match="HOME.*NEMO_RL_CACHE_DIR"):
        settings.cache_dir()
    monkeypatch.setenv("NEMO_RL_CACHE_DIR", str(tmp_path))
    assert settings.cache_dir() == tmp_path


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without a project around it, for a package that is not in a source tree."""
    monkeypatch.delenv("NEMO_RL_PROJECT_ROOT", raising=False)
    monkeypatch.setattr(settings, "__file__", str(tmp_path / "site-packages" / "nemo_rl" / "settings.py"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_project_is_the_nearest_one_upward(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, tools, deep = outside / "project", outside / "project" / "tools", outside / "project" / "tools" / "deep"
    deep.mkdir(parents=True)
    (project / "pyproject.toml").write_text('[project]\nname = "mine"\n')
    (tools / "pyproject.toml").write_text("[tool.ruff]\nline-length = 100\n")  # no project
    monkeypatch.chdir(deep)
    assert settings.project_root() == project
    assert settings.venv_dir() == project / "venvs"
    (tools / "pyproject.toml").write_text('[tool.uv.workspace]\nmembers = ["a"]\n')  # a workspace without a project
    assert settings.project_root() == tools
    monkeypatch.setenv("NEMO_RL_PROJECT_ROOT", str(outside / "other"))
    assert settings.project_root() == outside / "other"


def test_source_tree_is_the_project_without_one_upward(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"neither .* nor a directory above it has .*NEMO_RL_PROJECT_ROOT"):
        settings.project_root()
    clone = outside / "clone"
    (clone / "nemo_rl").mkdir(parents=True)
    (clone / "pyproject.toml").write_text('[project]\nname = "nemo-rl"\n')
    monkeypatch.setattr(settings, "__file__", str(clone / "nemo_rl" / "settings.py"))
    assert settings.project_root() == clone


def test_alias_is_read_if_the_name_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NEMO_RL_CONTAINER", "NEMO_RL_VENV_DRIFT", "NRL_IGNORE_VERSION_MISMATCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NRL_CONTAINER", "1")
    assert settings.venv_drift() == "refuse"
    monkeypatch.setenv("NRL_IGNORE_VERSION_MISMATCH", "1")
    assert settings.venv_drift() == "ignore"
    monkeypatch.setenv("NEMO_RL_VENV_DRIFT", "rebuild")
    assert settings.venv_drift() == "rebuild"
    monkeypatch.setenv("NEMO_RL_CONTAINER", "0")
    assert not settings.CONTAINER.get()
    monkeypatch.setenv("NEMO_RL_CONTAINER", "")
    monkeypatch.setenv("NRL_CONTAINER", "maybe")
    with pytest.raises(ConfigError, match="NRL_CONTAINER='maybe'"):
        settings.CONTAINER.get()
