"""Distillation as a user runs it: real processes, real Ray, real venvs. The teacher is a random model."""

import json
import subprocess
from pathlib import Path

import pytest
from grpo_jobs import ROOT, command, has_saved, metrics, orphans, reproducible_metrics, run, wait_for

from nemo_rl.models.embedded import make_model, make_tokenizer
from nemo_rl.models.policy.config import EmbeddedModelConfig

SCRIPT = ROOT / "examples" / "run_distillation.py"
SMALL = (
    "distillation.objective=sampled",
    "policy.train_global_batch_size=null",
    "distillation.max_num_steps=4",
    "distillation.num_prompts_per_step=8",
    "distillation.validation.period=2",
    "distillation.validation.max_num_problems=16",
    "checkpointing.save_period=1",
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("teacher")
    tokenizer = make_tokenizer()
    make_model(EmbeddedModelConfig(hidden_size=64, seed=1), tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return f"teacher.model_name={directory}"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, teacher) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = run(*SMALL, teacher, f"logger.log_dir={directory}", script=SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.mark.slow  # starts jobs
def test_killed_run_resumes_with_equal_metrics(tmp_path, teacher, uninterrupted):
    directory = tmp_path / "run"
    arguments = (*SMALL, teacher, f"logger.log_dir={directory}")
    job = subprocess.Popen(
        command(*arguments, script=SCRIPT), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: has_saved(directory, 2), job)
    job.kill()
    job.wait()
    wait_for(lambda: not orphans(job.pid), None, seconds=300)
    resumed = run(*arguments, script=SCRIPT)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming from" in resumed.stderr
    assert reproducible_metrics(metrics(directory)) == reproducible_metrics(metrics(uninterrupted))
    workers = json.loads((directory / "attestation.json").read_text())
    [attested] = [worker for worker in workers if worker["group"] == "teacher"]
    assert attested["fqn"].endswith("TorchTeacherWorker")
    assert attested["venv_digest"]
    assert "KL to the teacher" in (directory / "report.html").read_text()


@pytest.mark.slow  # starts a job in the venv of Megatron-Core
def test_megatron_student_learns_from_a_teacher_on_its_own_bundles(tmp_path, teacher, uninterrupted):
    directory = tmp_path / "run"
    overrides = ("policy.backend=megatron", "teacher.cluster.cpu_workers_per_node=1", "checkpointing.enabled=false")
    done = run(*SMALL, teacher, *overrides, f"logger.log_dir={directory}", script=SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("train/kl_to_teacher", "train/teacher_logprob", "train/entropy_estimate"):
        values, expected = ([r[name] for r in metrics(path) if name in r] for path in (directory, uninterrupted))
        assert values == pytest.approx(expected, rel=2e-3), name
