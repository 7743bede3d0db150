"""Masking of secrets."""

from __future__ import annotations

import doctest
import json

import pytest

from nemo_rl import secrets, settings
from nemo_rl.secrets import flatten, has_credentials, is_secret_variable, mask_secrets, secret_words


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


SECRET_URLS = [
    "https://user:S3CRET@host/simple",
    "http://S3CRET@host:8080",
    "HTTPS://user:S3CRET@host",
    "https://user:pa@S3CRET@host/simple",
    "git+https://S3CRET@github.com/a/b@v1",
    "socks5h://user:S3CRET@proxy:1080",
    "postgresql+psycopg://user:S3CRET@db/runs",
    "redis://:S3CRET@host:6379/0",
    "https://bucket.example/s.zip?X-Amz-Date=1&X-Amz-Signature=S3CRET",
    "https://host/s.zip?sig=S3CRET&se=1",
    "https://host/?access_token=S3CRET#top",
]
PLAIN_URLS = [
    "https://host/simple",
    "http://proxy:8080",
    "ssh://git@host/repository",
    "git+ssh://git@github.com/a/b@v1",
    "abfss://container@account.dfs.core.windows.net/s.zip",
    "https://github.com/a/b@v1",
    "https://host/?mail=me@host",
    "https://host/?max_tokens=3",
    "s3://bucket/key@1",
    "user:name@host",
]


@pytest.mark.parametrize("url", SECRET_URLS)
def test_urls_with_credentials(url: str) -> None:
    assert has_credentials(url)
    assert has_credentials(f"first,{url}")
    assert is_secret_variable("PLAIN_NAME", url)
    assert "S3CRET" not in mask_secrets(f"cannot open {url}: refused")
    assert list(secret_words(["python", f"--index={url}"])) == ["the URL with credentials in word 2"]


@pytest.mark.parametrize("url", PLAIN_URLS)
def test_urls_without_credentials(url: str) -> None:
    assert not has_credentials(url)
    assert not is_secret_variable("PLAIN_NAME", url)
    assert list(secret_words(["python", url, f"--index={url}"])) == []


@pytest.mark.parametrize(
    "words",
    [
        ["--api-key", "S3CRET"],
        ["--api_key", "S3CRET"],
        ["--wandb.api-key=S3CRET"],
        ["-token", "S3CRET"],
        ["+hub.token=S3CRET"],
        ["env", "HF_TOKEN=S3CRET", "python"],
        ["env", "AWS_SECRET_ACCESS_KEY=S3CRET", "python"],
        ["bash", "-c", "cd /x && HF_TOKEN=S3CRET python job.py --api-key S3CRET"],
        ["bash", "-c", "curl https://user:S3CRET@host/x | sh"],
    ],
)
def test_secret_words_of_a_command(words: list[str]) -> None:
    found = list(secret_words(words))
    assert found
    assert "S3CRET" not in " ".join(found)


@pytest.mark.parametrize(
    "words",
    [
        ["--max-new-tokens", "32"],
        ["--api-key-file", "/run/key"],
        ["--token", "--verbose"],
        ["--save-token"],
        ["policy.max_new_tokens=3", "pad_token_id=0"],
        ["token", "S"],
        ["HF_TOKEN="],
    ],
)
def test_plain_words_of_a_command(words: list[str]) -> None:
    assert list(secret_words(words)) == []


def test_examples_of_the_docstrings() -> None:
    assert doctest.testmod(secrets).failed == 0
