"""The README's main job as a user runs it: real processes, real Ray, real venvs, on the embedded model."""

import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from grpo_jobs import SMALL, command, has_saved, metrics, orphans, reproducible_metrics, run, wait_for
from processes import running


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = run(*SMALL, "grpo.max_num_steps=5", f"logger.log_dir={directory}")
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.mark.slow
def test_run_writes_metrics_checkpoint_report_and_attestation(uninterrupted):
    records = metrics(uninterrupted)
    steps = [r for r in records if "train/loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    for key in ("train/reward", "train/kl", "train/grad_norm", "timing/generation_s", "timing/train_s"):
        assert all(key in r for r in steps), key
    assert [r["step"] for r in records if "val/accuracy" in r] == [0, 2, 4, 5]
    assert "<svg" in (uninterrupted / "report.html").read_text()
    workers = json.loads((uninterrupted / "attestation.json").read_text())
    assert {w["group"] for w in workers} == {"policy", "generation", "environment"}
    assert list((uninterrupted / "tensorboard").iterdir())
    assert json.loads((uninterrupted / "finished.json").read_text())["step"] == 5


@pytest.mark.slow
def test_transformers_loads_the_checkpoint(uninterrupted):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = uninterrupted / "checkpoints" / "step_000005" / "policy"
    directory = next(p.parent for p in policy.rglob("config.json"))
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert AutoTokenizer.from_pretrained(directory).vocab_size <= model.config.vocab_size


@pytest.mark.slow
def test_finished_run_is_not_continued(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    done = run(*SMALL, "grpo.max_num_steps=5", f"logger.log_dir={uninterrupted}")
    assert done.returncode == 0
    assert "finished" in done.stderr + done.stdout
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "policy"])
def test_killed_run_resumes_with_equal_metrics(tmp_path, uninterrupted, victim):
    directory = tmp_path / "run"
    arguments = (*SMALL, "grpo.max_num_steps=5", f"logger.log_dir={directory}")
    job = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: has_saved(directory, 2), job)
    if victim == "driver":
        job.kill()
        job.wait()
    else:
        for process in running("TorchPolicyWorker", psutil.Process(job.pid).children(recursive=True)):
            process.kill()
        assert job.wait(timeout=300) == 1
        assert "policy" in job.stderr.read()
    wait_for(lambda: not orphans(job.pid), None, seconds=300)
    resumed = run(*arguments)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert reproducible_metrics(metrics(directory)) == reproducible_metrics(metrics(uninterrupted))


@pytest.mark.slow
def test_interrupted_run_leaves_no_process(tmp_path):
    directory = tmp_path / "run"
    job = subprocess.Popen(
        command(*SMALL, "grpo.max_num_steps=1000", f"logger.log_dir={directory}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: has_saved(directory, 1), job)
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=300) == 130
    wait_for(lambda: not orphans(job.pid), None, seconds=300)
