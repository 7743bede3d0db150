"""The GPU benchmark runs on a CPU, so that only the device is untested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "models" / "policy"))

from rank_processes import megatron_python  # noqa: E402


@pytest.mark.slow
def test_all_topics_run_on_cpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/bench_gpu.py", "--device", "cpu", "--tiny", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--json", str(file)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(file.read_text(encoding="utf-8"))
    medians = report["medians"]
    assert set(medians) >= {
        "matrix product, beside train torch tiny",
        "train torch tiny",
        "offload tiny",
        "copy, pinned memory",
        "generate torch tiny",
        "weights by shared_memory tiny",
        "copy on the device",
        "grpo step tiny",
    }
    assert medians["train torch tiny"]["tokens/s"] > 0
    assert {"timing/offload_s", "timing/generation_s", "timing/train_s"} <= set(medians["grpo step tiny"])
    assert any("not a measurement" in note for note in report["notes"])
    assert report["details"]["device"] == "cpu"


TRAIN_TWO_SIZES = """
import pathlib, sys, one_process, gpu_plan, gpu_topics
one_process.SIZES["next"] = one_process.SIZES["tiny"]
plan = gpu_plan.Plan("cpu", ("tiny", "next"), 1, num_tokens=16, batch=2, micro_batch=2, matmul=32)
results, ratios, _ = gpu_topics.train(plan, pathlib.Path(sys.argv[1]))
assert len(ratios) == 4, ratios
"""


@pytest.mark.slow
def test_several_sizes_train_in_one_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [megatron_python(), "-c", TRAIN_TWO_SIZES, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'benchmarks'}{os.pathsep}{ROOT}"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
