"""Checks a name that is a Hugging Face model directory or a name on the hub."""

from __future__ import annotations

from pathlib import Path

from nemo_rl.errors import ConfigError


def check_model_path(name: str, key: str, *, is_model: bool = True) -> None:
    """Raise `ConfigError`, which names the configuration `key`, if `name` looks like a path but does not exist.

    Args:
        name: The name.
        key: Its key in the configuration.
        is_model: A directory must have a `config.json`.
    """
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise ConfigError(f"{key}: there is no directory {name}; give a Hugging Face directory or hub name")
    if path.is_dir() and is_model and not (path / "config.json").is_file():
        raise ConfigError(f"{key}: {name} has no config.json, so it is not a Hugging Face model directory")
