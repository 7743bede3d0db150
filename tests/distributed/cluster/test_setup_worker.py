"""`setup_worker.py` starts a worker's process as Ray's script does, without importing ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray._private.workers.setup_worker as ray_setup_worker

import nemo_rl.distributed.cluster

SCRIPT = str(Path(nemo_rl.distributed.cluster.__file__).with_name("setup_worker.py"))
RAY_SCRIPT = ray_setup_worker.__file__
assert RAY_SCRIPT is not None

PRINT_STATE = """import json, os, sys
names = ("A", "B", "C", "PATH")
print(json.dumps([sys.argv[1:], sys.executable, {n: os.environ.get(n) for n in names}]))
"""


def run(script: str, directory: Path, context: dict[str, Any] | None, extra: list[str]) -> Any:
    worker = directory / "default_worker.py"
    worker.write_text(PRINT_STATE)
    arguments = [] if context is None else [f"--serialized-runtime-env-context={json.dumps(context)}"]
    command = [sys.executable, script, str(worker), *arguments, "--language=PYTHON", *extra]
    environment = {**os.environ, "A": "old", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("context", "extra"),
    [
        ({}, []),
        (None, ["--node-ip-address=127.0.0.1"]),
        (
            {"env_vars": {"A": "new", "B": "${A}-$A-$NO-${NOT_THERE}", "PATH": "/x/bin:${PATH}"}},
            ["--a=b c", "$A"],
        ),
        ({"py_executable": f"{sys.executable} -B"}, ["'quoted'"]),
        ({"py_executable": sys.executable, "command_prefix": ["C=prefixed"]}, ["--port=1"]),
        ({"py_executable": None, "java_jars": [], "override_worker_entrypoint": None}, []),
    ],
)
def test_equals_the_script_of_ray(tmp_path: Path, context: dict[str, Any] | None, extra: list[str]) -> None:
    assert run(SCRIPT, tmp_path, context, extra) == run(RAY_SCRIPT, tmp_path, context, extra)


def test_entrypoint_of_a_container(tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(PRINT_STATE.replace("print(", "print('[\"other\"]') or exit() or print("))
    assert run(SCRIPT, tmp_path, {"override_worker_entrypoint": str(other)}, []) == ["other"]


def test_unknown_fields_fall_back_to_the_script_of_ray(tmp_path: Path) -> None:
    (tmp_path / "setup_worker.py").write_text("import json, sys; print(json.dumps(['ray script', *sys.argv[2:]]))")
    answer = run(SCRIPT, tmp_path, {"a_field_of_the_future": 1}, ["--x"])
    assert answer[0] == "ray script"
    assert answer[-1] == "--x"


def test_does_not_import_ray(tmp_path: Path) -> None:
    code = f"import runpy, sys; runpy.run_path({SCRIPT!r}); print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
