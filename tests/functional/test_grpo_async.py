"""The asynchronous job: generation runs ahead of training, also across a crash."""

import subprocess

import pytest
from grpo_jobs import ROOT, SMALL, command, has_saved, metrics, orphans, reproducible_metrics, run, wait_for


@pytest.mark.slow  # runs the job three times
def test_killed_asynchronous_run_resumes_with_equal_metrics(tmp_path):
    config = ("--config", str(ROOT / "examples" / "configs" / "grpo_math_cpu_async.yaml"))
    arguments = (*config, *SMALL, "grpo.max_num_steps=5")
    uninterrupted = run(*arguments, f"logger.log_dir={tmp_path / 'uninterrupted'}")
    assert uninterrupted.returncode == 0, uninterrupted.stderr[-3000:]
    ages = [r["train/trajectory_age"] for r in metrics(tmp_path / "uninterrupted") if "train/loss" in r]
    assert ages == [0, 1, 1, 1, 1]
    directory = tmp_path / "run"
    job = subprocess.Popen(
        command(*arguments, f"logger.log_dir={directory}"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: has_saved(directory, 2), job)
    job.kill()
    job.wait()
    wait_for(lambda: not orphans(job.pid), None, seconds=300)
    resumed = run(*arguments, f"logger.log_dir={directory}")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert reproducible_metrics(metrics(directory)) == reproducible_metrics(metrics(tmp_path / "uninterrupted"))
