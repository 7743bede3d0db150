"""DPO as a user runs it: real processes, real Ray, real venvs, on the embedded chat model."""

import json
import subprocess

import pytest
from grpo_jobs import ROOT, command, has_saved, metrics, orphans, reproducible_metrics, run, wait_for

SCRIPT = ROOT / "examples" / "run_dpo.py"
SMALL = (
    "dpo.num_records_per_step=8",
    "dpo.max_num_epochs=2",
    "dpo.validation.period=2",
    "dpo.validation.max_num_records=15",
    "data.train.max_num_records=24",
    "checkpointing.save_period=1",
    "policy.scheduler.warmup_steps=2",
    "cluster.cpu_workers_per_node=2",
    "policy.sharding=fsdp",
    "policy.batching.mode=packed",
    "policy.batching.max_tokens=256",
)


@pytest.mark.slow  # starts jobs
def test_killed_run_resumes_with_equal_metrics(tmp_path):
    """Two workers with FSDP2 and packing, which must keep the answers of each pair together."""
    uninterrupted, directory = tmp_path / "uninterrupted", tmp_path / "run"
    done = run(*SMALL, f"logger.log_dir={uninterrupted}", script=SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    records = metrics(uninterrupted)
    assert [r["step"] for r in records if "train/loss" in r] == list(range(1, 7))
    losses = [r["val/loss"] for r in records if "val/loss" in r]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < losses[0]
    assert [r["val/reward_margin"] for r in records if "val/loss" in r][-1] > 0
    assert json.loads((uninterrupted / "data.json").read_text())["train"]["pairs"] == 24
    page = (uninterrupted / "report.html").read_text()
    assert "<svg" in page
    assert "validation reward accuracy" in page

    arguments = (*SMALL, f"logger.log_dir={directory}")
    job = subprocess.Popen(
        command(*arguments, script=SCRIPT), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: has_saved(directory, 3), job)
    job.kill()
    job.wait()
    wait_for(lambda: not orphans(job.pid), None, seconds=300)
    computed = (directory / "reference_train.safetensors").read_bytes()
    resumed = run(*arguments, script=SCRIPT)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming from" in resumed.stderr
    assert "computing the reference policy's log-probabilities" not in resumed.stderr
    assert reproducible_metrics(metrics(directory)) == reproducible_metrics(metrics(uninterrupted))
    assert computed == (directory / "reference_train.safetensors").read_bytes()
    assert computed == (uninterrupted / "reference_train.safetensors").read_bytes()
