"""Supervised fine-tuning as a user runs it: real processes, real Ray, real venvs, on the embedded chat model."""

import json
import subprocess
from pathlib import Path

import pytest
from grpo_jobs import ROOT, command, has_saved, metrics, orphans, reproducible_metrics, run, wait_for

SCRIPT = ROOT / "examples" / "run_sft.py"
SMALL = (
    "sft.num_records_per_step=8",
    "sft.max_num_epochs=2",
    "sft.validation.period=2",
    "sft.validation.max_num_records=15",
    "data.train.max_num_records=32",
    "checkpointing.save_period=1",
    "policy.scheduler.warmup_steps=2",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = run(*SMALL, f"logger.log_dir={directory}", script=SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.mark.slow  # starts a job
def test_run_writes_metrics_checkpoint_report_and_attestation(uninterrupted):
    records = metrics(uninterrupted)
    steps = [r for r in records if "train/loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert steps[-1]["train/epoch"] == 2.0
    losses = [r["val/loss"] for r in records if "val/loss" in r]
    assert [r["step"] for r in records if "val/loss" in r] == [0, 2, 4, 6, 8]
    assert losses[-1] < losses[0]
    assert steps[0]["train/lr"] > steps[-1]["train/lr"] > 0  # the schedule ends with the last of the epochs' steps
    page = (uninterrupted / "report.html").read_text()
    assert "<svg" in page
    assert "validation loss" in page
    workers = json.loads((uninterrupted / "attestation.json").read_text())
    assert [w["group"] for w in workers] == ["policy"]
    assert json.loads((uninterrupted / "data.json").read_text())["train"]["conversations"] == 32
    assert json.loads((uninterrupted / "finished.json").read_text()) == {"step": 8, "reason": "all 2 epochs are done"}


@pytest.mark.slow  # starts a job
def test_finished_run_is_not_continued(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    done = run(*SMALL, f"logger.log_dir={uninterrupted}", script=SCRIPT)
    assert done.returncode == 0
    assert "is finished: all 2 epochs are done" in done.stderr
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow  # starts jobs
def test_killed_run_resumes_with_equal_metrics(tmp_path, uninterrupted):
    directory = tmp_path / "run"
    arguments = (*SMALL, f"logger.log_dir={directory}")
    job = subprocess.Popen(
        command(*arguments, script=SCRIPT), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: has_saved(directory, 3), job)
    job.kill()
    job.wait()
    wait_for(lambda: not orphans(job.pid), None, seconds=300)
    resumed = run(*arguments, script=SCRIPT)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming from" in resumed.stderr
    assert reproducible_metrics(metrics(directory)) == reproducible_metrics(metrics(uninterrupted))


@pytest.mark.slow  # starts a job
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_workers_with_packing_train_like_one(tmp_path, uninterrupted, sharding):
    directory = tmp_path / "run"
    done = run(
        *SMALL,
        "cluster.cpu_workers_per_node=2",
        f"policy.sharding={sharding}",
        "policy.batching.mode=packed",
        "policy.batching.max_tokens=128",
        f"logger.log_dir={directory}",
        script=SCRIPT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("train/loss", "val/loss", "train/grad_norm"):
        values, expected = ([r[name] for r in metrics(path) if name in r] for path in (directory, uninterrupted))
        assert values == pytest.approx(expected, rel=2e-3), name


@pytest.mark.slow  # starts a job
def test_adapters_learn(tmp_path):
    directory = tmp_path / "run"
    done = run(*SMALL, "policy.lora.rank=4", "policy.optimizer.lr=1e-2", f"logger.log_dir={directory}", script=SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [r["val/loss"] for r in metrics(directory) if "val/loss" in r]
    assert losses[-1] < losses[0]
    assert (directory / "checkpoints" / "step_000008" / "policy" / "adapter" / "adapter_config.json").exists()


@pytest.mark.slow  # starts a job in the venv of Megatron-Core
def test_megatron_trains_like_torch(tmp_path, uninterrupted):
    directory = tmp_path / "run"
    megatron = (
        "policy.backend=megatron",
        "cluster.cpu_workers_per_node=2",
        "policy.options.tensor_parallel_size=2",
        "policy.options.sequence_parallel=true",
    )
    done = run(*SMALL, *megatron, f"logger.log_dir={directory}", script=SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("train/loss", "val/loss"):
        values, expected = ([r[name] for r in metrics(path) if name in r] for path in (directory, uninterrupted))
        assert values == pytest.approx(expected, rel=2e-3), name


@pytest.mark.slow  # starts a job
def test_grpo_continues_from_the_checkpoint(tmp_path, uninterrupted):
    model = uninterrupted / "checkpoints" / "step_000008" / "policy" / "model"
    done = run(
        "--config",
        str(ROOT / "examples" / "configs" / "grpo_tool_calculator.yaml"),
        f"policy.model_name={model}",
        "grpo.max_num_steps=1",
        "grpo.num_prompts_per_step=4",
        "grpo.validation.max_num_problems=32",
        "checkpointing.enabled=false",
        f"logger.log_dir={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # The embedded model alone calls the calculator in a quarter of the cases.
    assert metrics(tmp_path / "run")[0]["val/accuracy"] > 0.4
