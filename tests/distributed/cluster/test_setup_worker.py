"""The script that starts workers' processes does what Ray's own does, without importing ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray._private.workers.setup_worker as rays_script

import nemo_rl.distributed.cluster

OURS = str(Path(nemo_rl.distributed.cluster.__file__).with_name("setup_worker.py"))
RAYS = rays_script.__file__
assert RAYS is not None

SHOW = """import json, os, sys
names = ("A", "B", "C", "PATH")
print(json.dumps([sys.argv[1:], sys.executable, {n: os.environ.get(n) for n in names}]))
"""


def run(script: str, directory: Path, context: dict[str, Any] | None, extra: list[str]) -> Any:
    worker = directory / "default_worker.py"
    worker.write_text(SHOW)
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
def test_equals_rays_own_script(tmp_path: Path, context: dict[str, Any] | None, extra: list[str]) -> None:
    assert run(OURS, tmp_path, context, extra) == run(RAYS, tmp_path, context, extra)


def test_entrypoint_of_a_container(tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(SHOW.replace("print(", "print('[\"other\"]') or exit() or print("))
    assert run(OURS, tmp_path, {"override_worker_entrypoint": str(other)}, []) == ["other"]


def test_what_it_does_not_know_is_left_to_rays_script(tmp_path: Path) -> None:
    (tmp_path / "setup_worker.py").write_text("import json, sys; print(json.dumps(['left to ray', *sys.argv[2:]]))")
    answer = run(OURS, tmp_path, {"a_field_of_the_future": 1}, ["--x"])
    assert answer[0] == "left to ray"
    assert answer[-1] == "--x"


def test_it_does_not_import_ray(tmp_path: Path) -> None:
    code = f"import runpy, sys; runpy.run_path({OURS!r}); print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
