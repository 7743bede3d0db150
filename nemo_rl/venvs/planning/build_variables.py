"""Variables that builds of source packages read, such as `MAX_JOBS` or `NVTE_FRAMEWORK`.

uv receives no such variable unless the project or the user names it::

    [tool.nemo-rl]
    build-variables = ["MAX_JOBS", "NVTE_*", "CUDNN_*"]

    export NEMO_RL_BUILD_VARIABLES=TORCH_CUDA_ARCH_LIST

A name may end in `*`. The values that this process has for the named variables decide what a build produces. So they
are part of a plan and of its digest, and every node builds with the values of the process that planned.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

from nemo_rl import settings
from nemo_rl.errors import ConfigError
from nemo_rl.secrets import mask_secrets
from nemo_rl.venvs.storage.layout import UNSET_IN_VENV

TABLE, KEY = "nemo-rl", "build-variables"
_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?")
# They select the interpreter, the environment or uv's own behaviour, and could redirect an installation.
_RESERVED_PREFIXES = ("UV_",)
_RESERVED = frozenset({*UNSET_IN_VENV, "VIRTUAL_ENV", "CONDA_PREFIX", "PATH", "HOME", "TMPDIR", "LD_PRELOAD"})


def build_variables(projects: Iterable[Path]) -> dict[str, str]:
    """Return the variables of this process that builds receive, sorted by name.

    Args:
        projects: directories whose `pyproject.toml` may name variables; `NEMO_RL_BUILD_VARIABLES` names more.

    Raises:
        ConfigError: a list or a name in it is not valid.
    """
    names = (settings.BUILD_VARIABLES.get() or "").replace(",", " ").split()
    patterns = _checked(names, settings.BUILD_VARIABLES.name)
    for project in dict.fromkeys(projects):
        patterns += _named_by(project / "pyproject.toml")
    return {
        name: value
        for name, value in sorted(settings.snapshot().items())
        if not _is_reserved(name) and any(_matches(name, pattern) for pattern in patterns)
    }


def shown_variables(variables: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return variables for manifests and messages, with secrets masked."""
    return {name: mask_secrets(value) for name, value in settings.masked(dict(variables)).items()}


def _named_by(path: Path) -> list[str]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
    except (OSError, ValueError):
        return []  # resolving the project reports it
    table = tables.get(TABLE, {}) if isinstance(tables, dict) else {}
    names = table.get(KEY, []) if isinstance(table, dict) else []
    where = f"`{KEY}` in [tool.{TABLE}] of {path}"
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f'{where} must be a list of names, such as ["MAX_JOBS", "NVTE_*"]; got {names!r}.')
    return _checked(names, where)


def _checked(names: Iterable[str], where: str) -> list[str]:
    names = list(names)
    for name in names:
        if not _PATTERN.fullmatch(name):
            raise ConfigError(f"{where}: {name!r} is not the name of a variable, or the start of one followed by `*`.")
        if _is_reserved(name):
            raise ConfigError(
                f"{where}: builds cannot receive {name}, which decides where or with which Python uv installs. "
                "Remove it from the list."
            )
    return names


def _is_reserved(name: str) -> bool:
    return name in _RESERVED or name.startswith(_RESERVED_PREFIXES)


def _matches(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
