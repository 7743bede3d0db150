"""Whole jobs on several environments: a crash and a resume, and environments that fail."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from grpo_jobs import SMALL, command, has_saved, metrics, orphans, reproducible_metrics, run, wait_for

sys.path.append(str(Path(__file__).parent.parent / "venvs"))
from sample_projects import make_wheel

from nemo_rl.venvs import Store, list_venvs

SUMS = ("env.sums.class=episode_tasks.TwoSums", "env.sums.data.train.kind=seeds", "env.sums.max_turns=2")


@pytest.fixture(autouse=True)
def tasks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def ledger(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "episodes.jsonl").read_text().splitlines()]


@pytest.mark.slow  # runs the job three times
@pytest.mark.parametrize("age", [0, 1])
def test_killed_run_resumes_with_equal_metrics_and_ledger(tmp_path: Path, age: int) -> None:
    arguments = (
        *SMALL,
        *SUMS,
        "env.exact.class=episode_tasks.exact",
        "env.math.weight=1",
        "grpo.max_num_steps=5",
        f"grpo.max_trajectory_age={age}",
        "loss.importance_correction=token",
    )
    uninterrupted = run(*arguments, f"logger.log_dir={tmp_path / 'uninterrupted'}")
    assert uninterrupted.returncode == 0, uninterrupted.stderr[-3000:]
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
    assert ledger(directory) == ledger(tmp_path / "uninterrupted")
    seen = Counter((record["step"], record["environment"]) for record in ledger(directory))
    assert {environment for _, environment in seen} == {"math", "exact", "sums"}

    pairs = zip(*(reproducible_metrics(metrics(d)) for d in (directory, tmp_path / "uninterrupted")), strict=True)
    for found, expected in pairs:
        untimed = {key for key in expected if not key.endswith(("step_s", "generation_busy"))}
        # The time of replies decides which transcripts are sampled in one batch, and this how sums are rounded.
        assert {key: found[key] for key in untimed} == pytest.approx({key: expected[key] for key in untimed}, abs=1e-3)


@pytest.mark.slow  # restarts workers
def test_failures_of_an_environment_are_contained(tmp_path: Path) -> None:
    """A tenth of the steps fails, and workers die. Every episode is accounted for, and few are lost."""
    kills = tmp_path / "kills"
    kills.mkdir()
    directory = tmp_path / "run"
    stop = threading.Event()

    def kill_workers() -> None:
        """Kill one worker per training step, so that the number of kills does not depend on the machine's speed."""
        num_records = 0
        while not stop.wait(0.2):
            path = directory / "episodes.jsonl"
            found = path.read_text().count("\n") if path.exists() else 0
            if found > num_records:
                num_records = found
                (kills / "kill").touch()

    killer = threading.Thread(target=kill_workers)
    killer.start()
    try:
        job = run(
            *SMALL,
            *SUMS,
            "env.sums.config.failure_rate=0.1",
            f"env.sums.config.kill_dir={kills}",
            "env.sums.num_replicas=2",
            "env.max_retries=4",
            "grpo.max_num_steps=6",
            f"logger.log_dir={directory}",
        )
    finally:
        stop.set()
        killer.join()
    assert job.returncode == 0, job.stderr[-3000:]
    records = ledger(directory)
    per_step = Counter(record["step"] for record in records)
    assert sorted(per_step) == [1, 2, 3, 4, 5, 6]
    assert len(set(per_step.values())) == 1
    retried = [record for record in records if record["attempts"] > 1]
    assert len(retried) > 0.05 * len(records)
    assert all(record["failure"] for record in retried)
    for record in records:
        assert (record["end"] == "failed") == (record["reward"] is None)
        assert record["outcome"] == ("masked" if record["end"] == "failed" else "trained")
    assert sum(record["end"] == "failed" for record in records) < 0.1 * len(records)


@pytest.mark.slow  # starts a job
def test_environment_that_always_fails_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    job = run(*SMALL, *SUMS, "env.sums.config.failure_rate=1", f"logger.log_dir={tmp_path / 'run'}")
    assert job.returncode != 0
    [line] = [line for line in job.stderr.splitlines() if line.startswith("error:")]
    assert "env.max_failed_fraction=0.1" in line
    assert "raised ConnectionError: the task server does not answer" in line


@pytest.mark.slow  # starts a job
def test_venvs_of_environments_are_built_together_before_a_worker_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_RL_VENV_DIR", str(tmp_path / "venvs"))
    monkeypatch.setenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", "1")  # of policy and generation

    def with_package(name: str) -> str:
        wheel = make_wheel(tmp_path, name, "1.0").as_uri()
        return f"{{uv: ['{name} @ {wheel}'], env_vars: {{PYTHONPATH: {Path(__file__).parent}}}}}"

    directory = tmp_path / "run"
    job = run(
        *SMALL,
        *(f"env.{name}.class=episode_tasks.TwoSums" for name in ("added", "child", "other")),
        *(f"env.{name}.data.train.kind=seeds" for name in ("added", "child", "other")),
        "env.child.own_process=true",
        *(f"env.{name}.runtime_env={with_package('alpha')}" for name in ("added", "child")),
        f"env.other.runtime_env={with_package('beta')}",
        "grpo.max_num_steps=1",
        f"logger.log_dir={directory}",
    )
    assert job.returncode == 0, job.stderr[-3000:]
    workers = {record["group"]: record for record in json.loads((directory / "attestation.json").read_text())}
    digests = {
        "added": workers["environment added"]["venv_digest"],
        "child": workers["environment child"]["child"]["venv_digest"],
        "other": workers["environment other"]["venv_digest"],
    }
    assert digests["added"] == digests["child"]  # equal packages are built once
    venvs = list_venvs(Store(tmp_path / "venvs"))
    assert {venv.digest for venv in venvs} == {digest[:16] for digest in digests.values()}
    first_start = min(start for record in workers.values() for _, start, _ in record["phases"])
    for venv in venvs:
        assert venv.manifest is not None
        assert venv.manifest.started_at + sum(venv.manifest.seconds.values()) < first_start
