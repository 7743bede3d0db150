"""Starts the processes of workers in local Ray clusters; a script that the raylet runs, never imported.

A raylet starts every process that has a `runtime_env` with Ray's own `setup_worker.py`, which imports all of ray in the
driver's Python, only to set some variables and replace itself with the real worker, which imports all of ray once more
in the worker's Python. That is half of the CPU time that starting a worker costs (0.45 of 0.95 s, ray 2.60). This
script does the same without the import. Anything it does not know is left to Ray's script.

`ray_session` points Ray to this file for the local clusters that it starts. The raylet looks for the file's name in the
command line, so it must stay `setup_worker.py`. It does what `ray._private.runtime_env.context.RuntimeEnvContext` does
(checked with ray 2.60).
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
    """The context, the language, and the worker's own command line."""
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
        # Like Ray: `${NAME}` is replaced, by nothing if there is no such variable.
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))


def main(arguments: list[str]) -> None:
    """Become the worker's process."""
    context, language, command = _split(arguments)
    if language != "PYTHON" or not command or set(context) - _KNOWN_FIELDS:
        rays_own = os.path.join(os.path.dirname(command[0]), "setup_worker.py") if command else ""
        os.execv(sys.executable, [sys.executable, rays_own, *arguments])
    _set_variables(context.get("env_vars") or {})
    if context.get("override_worker_entrypoint"):
        command[0] = context["override_worker_entrypoint"]
    python = context.get("py_executable") or sys.executable
    prefix = context.get("command_prefix") or []
    if not prefix and os.path.isfile(python):
        os.execv(python, [python, *command])
    # Whatever a plugin or a user writes there is for a shell.
    line = " ".join([*prefix, "exec", python, *map(shlex.quote, command)])
    os.execvp("bash", ["bash", "-c", line])


if __name__ == "__main__":
    main(sys.argv[1:])
