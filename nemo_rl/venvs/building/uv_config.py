"""Gives uv the variables of a build, so that uv's cache distinguishes what different values produce.

uv caches the wheel that it builds from a source package, and does not know which variables the build has read. With
variables in uv's environment alone, it would install a wheel that was built with other values. Values in the setting
`extra-build-variables` are part of the key of its cache. That setting exists only in configuration files. uv merges the
system's, the user's and the project's file, so a file that takes the place of the system's, with its content, adds the
variables and hides nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from nemo_rl.venvs.uv import uv_environment

_DEFAULT_DIRECTORIES = "/etc/xdg"
_SYSTEM_FILE = Path("/etc/uv/uv.toml")
_KEY = "extra-build-variables"


@contextlib.contextmanager
def uv_build_environment(variables: Mapping[str, str], packages: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield variables for a call of uv, valid in the block, with which it builds `packages`.

    Args:
        variables: what builds receive; nothing is added if there are none.
        packages: names of the packages that uv may build.
    """
    if not variables:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="nemo_rl_uv_") as folder:
        path = Path(folder, "uv", "uv.toml")
        path.parent.mkdir()
        environment = uv_environment()
        only = environment.get("UV_CONFIG_FILE") or None
        replaced = Path(only) if only else None if environment.get("UV_NO_CONFIG") else _system_file(environment)
        path.write_text(_content(replaced, variables, packages), encoding="utf-8")
        if only or environment.get("UV_NO_CONFIG"):  # uv reads this file only, as it would have read only the other
            yield {**variables, "UV_CONFIG_FILE": str(path), "UV_NO_CONFIG": "false"}
        else:
            yield {**variables, "XDG_CONFIG_DIRS": folder}


def _system_file(environment: Mapping[str, str]) -> Path | None:
    """Return the system's configuration file that uv would read."""
    directories = (environment.get("XDG_CONFIG_DIRS") or _DEFAULT_DIRECTORIES).split(os.pathsep)
    candidates = [*(Path(directory, "uv", "uv.toml") for directory in directories if directory), _SYSTEM_FILE]
    return next((path for path in candidates if path.is_file()), None)


def _content(replaced: Path | None, variables: Mapping[str, str], packages: Iterable[str]) -> str:
    text = replaced.read_text(encoding="utf-8") if replaced is not None else ""
    defined = tomllib.loads(text).get(_KEY, {})
    # A JSON string is a TOML string.
    values = "".join(f"{json.dumps(name)} = {json.dumps(value)}\n" for name, value in variables.items())
    tables = [f"\n[{_KEY}.{json.dumps(name)}]\n{values}" for name in sorted(set(packages)) if name not in defined]
    return "".join([text, *tables])
