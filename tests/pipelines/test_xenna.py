"""The executor on cosmos-xenna, which the tests' own venv does not hold: it is laid over it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import packaging
import pytest

from nemo_rl import venvs
from nemo_rl.errors import PipelineDefinitionError
from nemo_rl.pipelines import XennaExecutor

SCRIPT = Path(__file__).with_name("xenna_script.py")


@pytest.mark.skipif(importlib.util.find_spec("cosmos_xenna") is not None, reason="cosmos-xenna is installed here")
def test_without_the_extra_the_error_says_how_to_get_it() -> None:
    with pytest.raises(PipelineDefinitionError, match="uv sync --extra xenna"):
        XennaExecutor()


@pytest.mark.slow
def test_pipelines_on_xenna_give_what_they_give_elsewhere(tmp_path: Path) -> None:
    spec = venvs.spec_from_runtime_env({"uv": ["cosmos-xenna==0.3.0"]}, sys.executable)
    python = venvs.ensure(spec, "with-xenna").python
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    command = [python, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    assert result["numbers"] == list(range(12))
    assert result["versions"] == [[packaging.__version__, "23.2", "24.0"]]
    assert result["kept"] == [1, 2, 7, 8]  # 2 and 3 came in the batch that failed
    assert [error.partition(":")[0] for error in result["failed"]] == ["ValueError"]
    assert "stage 'Failing' failed on task 'b3': ValueError: cannot take 7" in result["message"]
