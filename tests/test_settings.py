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
