"""Read the inline metadata of a script (PEP 723): its dependencies, Python and settings of uv."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rl.errors import InvalidPyExecutableError

_MAX_BYTES = 2**22  # interpreters are larger, or are no text
_BLOCK = re.compile(r"^# /// script$\s(?P<content>(?:^#(?:| .*)$\s)+)^# ///$", re.MULTILINE)  # PEP 723


def script_metadata(path: str | Path) -> dict[str, Any] | None:
    """Return the inline metadata of a script; None for a file without it.

    Raises:
        InvalidPyExecutableError: the metadata is not valid TOML.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES)
    except (OSError, ValueError):
        return None
    match = _BLOCK.search(content.decode("utf-8", "replace")) if b"# /// script" in content else None
    if match is None:
        return None
    lines = [line.removeprefix("# ").removeprefix("#") for line in match["content"].splitlines()]
    try:
        return tomllib.loads("\n".join(lines))
    except tomllib.TOMLDecodeError as error:
        raise InvalidPyExecutableError(f"The `# /// script` block of {path} is not valid TOML: {error}.") from None


def is_script(path: str) -> bool:
    """Return whether a file is a Python script or starts with uv, so that it is no interpreter."""
    try:
        with open(path, "rb") as file:
            head = file.read(256).partition(b"\n")[0]
    except (OSError, ValueError):
        return False
    return path.endswith(".py") or (head.startswith(b"#!") and b"uv run" in head)


def index_options_of(uv_settings: Mapping[str, Any], directory: str) -> tuple[str, ...]:
    """Return the index settings of a `tool.uv` table as options of `uv pip`.

    Args:
        directory: what relative paths in the table are relative to.
    """

    def location(value: str) -> str:
        return value if "://" in value else os.path.normpath(os.path.join(directory, value))

    options = ["--no-index"] if uv_settings.get("no-index") else []
    for index in uv_settings.get("index", ()):
        options.append(f"{'--index-url' if index.get('default') else '--extra-index-url'} {location(index['url'])}")
    if "index-url" in uv_settings:
        options.append(f"--index-url {location(uv_settings['index-url'])}")
    options += [f"--extra-index-url {location(url)}" for url in uv_settings.get("extra-index-url", ())]
    options += [f"--find-links {location(path)}" for path in uv_settings.get("find-links", ())]
    return tuple(options)
