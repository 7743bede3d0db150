"""Runs the default GRPO job with real processes, Ray and venvs on the embedded model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import running

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "run_grpo_math.py"
SMALL = (
    "grpo.num_prompts_per_step=4",
    "grpo.num_generations_per_prompt=4",
    "grpo.validation.period=2",
    "grpo.validation.max_num_problems=16",
    "checkpointing.save_period=1",
    "policy.train_global_batch_size=null",
)


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *arguments]


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=280, check=False, **options)


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def reproducible_metrics(records: list[dict]) -> list[dict]:
    """Drop the metrics that may differ between equal runs: times, and the logprob check after a resume."""
    skip = ("timing/", "perf/", "train/logprob_error", "val/env_verify_latency", "train/env_verify_latency", "time")
    return [{k: v for k, v in record.items() if not k.startswith(skip)} for record in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = run(*SMALL, "grpo.max_num_steps=5", f"logger.log_dir={directory}")
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


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


def test_transformers_loads_the_checkpoint(uninterrupted):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = uninterrupted / "checkpoints" / "step_000005" / "policy"
    directory = next(p.parent for p in policy.rglob("config.json"))
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert AutoTokenizer.from_pretrained(directory).vocab_size <= model.config.vocab_size


def test_finished_run_is_not_continued(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    done = run(*SMALL, "grpo.max_num_steps=5", f"logger.log_dir={uninterrupted}")
    assert done.returncode == 0
    assert "finished" in done.stderr + done.stdout
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("victim", ["driver", "policy"])
def test_killed_run_resumes_with_equal_metrics(tmp_path, uninterrupted, victim):
    directory = tmp_path / "run"
    arguments = (*SMALL, "grpo.max_num_steps=5", f"logger.log_dir={directory}")
    job = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (directory / "checkpoints" / "step_000002").exists(), job)
    if victim == "driver":
        job.kill()
        job.wait()
    else:
        for process in running("TorchPolicyWorker", psutil.Process(job.pid).children(recursive=True)):
            process.kill()
        assert job.wait(timeout=120) == 1
        assert "policy" in job.stderr.read()
    wait_for(lambda: not orphans(job.pid), None, seconds=60)
    resumed = run(*arguments)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert reproducible_metrics(metrics(directory)) == reproducible_metrics(metrics(uninterrupted))


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
    wait_for(lambda: (directory / "checkpoints" / "step_000002").exists(), job)
    job.kill()
    job.wait()
    wait_for(lambda: not orphans(job.pid), None, seconds=60)
    resumed = run(*arguments, f"logger.log_dir={directory}")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert reproducible_metrics(metrics(directory)) == reproducible_metrics(metrics(tmp_path / "uninterrupted"))


def test_interrupted_run_leaves_no_process(tmp_path):
    directory = tmp_path / "run"
    job = subprocess.Popen(
        command(*SMALL, "grpo.max_num_steps=1000", f"logger.log_dir={directory}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: (directory / "checkpoints" / "step_000001").exists(), job)
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=60) == 130
    wait_for(lambda: not orphans(job.pid), None, seconds=60)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["grpo.num_prompt_per_step=8"], "did you mean grpo.num_prompts_per_step?"),
        (["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["policy.backend=torhc"], "torch"),
        (["policy.model_name=/no/such/model"], "/no/such/model"),
        (["env.name=maths"], "math"),
        (["data.train.path=/no/such/file.jsonl"], "/no/such/file.jsonl"),
        (["data.max_prompt_length=2"], "data.max_prompt_length"),
        (
            ["grpo.num_prompts_per_step=3", "cluster.cpu_workers_per_node=2", "grpo.num_generations_per_prompt=3"],
            "evenly",
        ),
        (["policy.max_sequence_length=100000"], "max_sequence_length"),
        (["cluster.cpu_workers_per_node=512", "grpo.num_prompts_per_step=512"], "CPU"),
    ],
)
def test_invalid_input_is_one_sentence_and_leaves_no_process(tmp_path, arguments, expected):
    job = subprocess.Popen(
        command(*arguments, f"logger.log_dir={tmp_path / 'run'}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, errors = job.communicate(timeout=280)
    assert job.returncode == 2, errors[-3000:]
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert expected in last
    assert "Traceback" not in errors
    wait_for(lambda: not orphans(job.pid), None, seconds=60)


def test_help_lists_the_keys():
    done = run("--help")
    assert done.returncode == 0
    assert "grpo.num_prompts_per_step" in done.stdout


@pytest.mark.parametrize("config", sorted((ROOT / "examples" / "configs").glob("grpo_*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_has_a_plan(config, tmp_path):
    done = run("--config", str(config), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "policy" in done.stdout
    assert not list(tmp_path.iterdir())


def wait_for(condition, job: subprocess.Popen | None, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        if job is not None and job.poll() is not None:
            raise AssertionError(f"the job ended with {job.returncode}: {job.stderr.read() if job.stderr else ''}")
        time.sleep(0.2)


def orphans(driver: int) -> list[int]:
    """Return the Ray processes of the session that `driver` started. The session name has its process id."""
    pids = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if f"_{driver}/" in line or line.endswith(f"_{driver}"):
            pids.append(process.pid)
    return [pid for pid in pids if pid not in (driver, os.getpid())]
