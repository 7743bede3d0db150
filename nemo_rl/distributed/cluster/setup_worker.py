"""Starts the worker processes of a local Ray cluster. The raylet runs this script; it is never imported.

A raylet starts every process that has a `runtime_env` with Ray's `setup_worker.py`. That script imports all of ray in
the driver's Python, sets some variables and replaces itself with the real worker, which imports all of ray again in the
worker's Python. The first import is half of the CPU time that starting a worker costs (0.45 of 0.95 s, Ray 2.60). This
script does the same without the import and falls back to Ray's script for anything that it does not know. In a warm
session it starts the worker from a template instead (`template_client`).

`session` points Ray to this file for the local clusters that it starts. The raylet looks for the file's name in the
command line, so it must stay `setup_worker.py`. The script follows
`ray._private.runtime_env.context.RuntimeEnvContext` (checked with Ray 2.60; `tests/distributed/test_ray_private.py`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys

_CONTEXT_OPTION = "--serialized-runtime-env-context="
_LANGUAGE_OPTION = "--language="
_KNOWN_FIELDS = {"command_prefix", "env_vars", "py_executable", "override_worker_entrypoint", "java_jars"}


def _split(arguments: list[str]) -> tuple[dict, str, list[str]]:
    """Return the context, the language, and the command line of the worker."""
    context: dict = {}
    language = ""
    rest: list[str] = []
    for argument in arguments:
        if argument.startswith(_CONTEXT_OPTION):
            context = json.loads(argument[len(_CONTEXT_OPTION) :] or "{}")
        elif argument.startswith(_LANGUAGE_OPTION):
            language = argument[len(_LANGUAGE_OPTION) :]
        else:
            rest.append(argument)
    return context, language, rest


def _set_variables(env_vars: dict[str, str]) -> None:
    for name, value in env_vars.items():
        # As in Ray, `${NAME}` is expanded, to the empty string if there is no such variable.
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))


def _start_from_template(python: str, command: list[str]) -> list[str] | None:
    """Start the worker by fork and return None if this cluster belongs to a warm session that has a template for it.

    Otherwise return the command of the worker.
    """
    if not os.environ.get("NEMO_RL_TEMPLATE"):
        return command
    import template_client  # next to this script, which runs by its path

    started: list[str] | None = template_client.worker_command(python, command)
    return started


def main(arguments: list[str]) -> None:
    """Replace this process with the worker's, or start the worker and end."""
    context, language, command = _split(arguments)
    if language != "PYTHON" or not command or set(context) - _KNOWN_FIELDS:
        ray_script = os.path.join(os.path.dirname(command[0]), "setup_worker.py") if command else ""
        os.execv(sys.executable, [sys.executable, ray_script, *arguments])
    _set_variables(context.get("env_vars") or {})
    if context.get("override_worker_entrypoint"):
        command[0] = context["override_worker_entrypoint"]
    python = context.get("py_executable") or sys.executable
    prefix = context.get("command_prefix") or []
    if not prefix and os.path.isfile(python):
        to_run = _start_from_template(python, command)
        if to_run is not None:
            os.execv(python, [python, *to_run])
        return
    # A prefix or an executable given by a plugin or a user may use shell syntax.
    line = " ".join([*prefix, "exec", python, *map(shlex.quote, command)])
    os.execvp("bash", ["bash", "-c", line])


if __name__ == "__main__":
    main(sys.argv[1:])
