from __future__ import annotations

import json

from nemo_rl import settings
from nemo_rl.secrets import flatten, mask_secrets


def test_secrets_are_masked_and_look_alikes_are_not() -> None:
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
