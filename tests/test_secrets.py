"""Masking of secrets."""

from __future__ import annotations

import doctest
import json

import pytest

from nemo_rl import secrets, settings
from nemo_rl.secrets import flatten, mask_secrets


def test_mask_secrets_by_key() -> None:
    config = {
        "wandb": {"api_key": "abc", "project": "p"},
        "hub_token": "abc",
        "token": "abc",
        "tracking_uri": "https://user:abc@host/path",
        "max_new_tokens": 32,
        "tokenizer_name": "llama",
        "pad_token_id": 0,
        "empty": {},
        "password": ["abc"],
    }
    masked = dict(flatten(mask_secrets(config)))
    assert "abc" not in json.dumps(masked)
    assert masked == {
        "wandb.api_key": settings.MASK,
        "wandb.project": "p",
        "hub_token": settings.MASK,
        "token": settings.MASK,
        "tracking_uri": f"https://{settings.MASK}@host/path",
        "max_new_tokens": 32,
        "tokenizer_name": "llama",
        "pad_token_id": 0,
        "empty": {},
        "password": [settings.MASK],
    }


def test_credentials_in_text_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_INDEX_PRIVATE_PASSWORD", "hunter2")
    monkeypatch.setenv("UV_INDEX_OTHER_PASSWORD", "abc")  # too short: it would match unrelated text
    monkeypatch.setenv("UV_INDEX_STRATEGY", "first-index")
    text = mask_secrets("`git+https://user:pa'ss@host/path@v1` and 'https://host/simple', hunter2, abc, first-index")
    assert text == (
        f"`git+https://{settings.MASK}@host/path@v1` and 'https://host/simple', {settings.MASK}, abc, first-index"
    )
    assert mask_secrets({"command": ["uv", "hunter2"]}) == {"command": ["uv", settings.MASK]}


def test_examples_of_the_docstrings() -> None:
    assert doctest.testmod(secrets).failed == 0
