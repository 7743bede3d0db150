"""Metrics files, listeners and backends of the logger."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_rl.errors import ConfigError
from nemo_rl.observability import logger as logger_module
from nemo_rl.observability import logger_backends
from nemo_rl.observability.logger import METRICS_FILE, SAMPLES_FILE, Logger
from nemo_rl.observability.logger_backends import BACKENDS, BackendEntry, RunInfo
from nemo_rl.observability.logger_config import LoggerConfig, MlflowConfig, WandbConfig
from nemo_rl.utils.jsonl import read_jsonl

QUIET = LoggerConfig(tensorboard=False)


class Memory:
    """A backend and listener that stores what it receives, and calls `fail` for every record."""

    def __init__(self, fail: Callable[[], None] = lambda: None) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.parameters: dict[str, Any] = {}
        self.closed = False
        self._fail = fail

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._fail()
        self.metrics.append((step, dict(metrics)))

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        self.parameters = dict(values)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[Memory], None]:
    def add(backend: Memory) -> None:
        monkeypatch.setitem(BACKENDS, "memory", BackendEntry(lambda config: True, lambda run: backend))

    return add


def test_one_line_per_record(tmp_path: Path) -> None:
    with Logger(tmp_path, QUIET) as log:
        log.log_metrics(0, {"val/accuracy": 0.25})
        log.log_metrics(1, {"train/loss": np.float32(0.5), "train/n": torch.tensor(3), "train/flag": True})
        # Readers see every line immediately, while the logger is still open.
        assert (tmp_path / METRICS_FILE).read_text() == (
            '{"step": 0, "val/accuracy": 0.25}\n{"step": 1, "train/loss": 0.5, "train/n": 3, "train/flag": 1}\n'
        )


def test_non_finite_values_become_null(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, register: Callable[[Memory], None]
) -> None:
    backend = Memory()
    register(backend)
    with Logger(tmp_path, QUIET) as log:
        for step in (1, 2):
            log.log_metrics(step, {"train/loss": float("nan"), "train/kl": float("-inf"), "train/reward": 1.0})
    assert read_jsonl(tmp_path / METRICS_FILE)[1] == {
        "step": 2,
        "train/loss": None,
        "train/kl": None,
        "train/reward": 1.0,
    }
    assert [r.message for r in caplog.records if "train/loss" in r.message] == [
        "step 1: train/loss is nan; metrics.jsonl stores null"
    ]
    assert backend.metrics == [(1, {"train/reward": 1.0}), (2, {"train/reward": 1.0})]


def test_non_numeric_metrics_are_refused(tmp_path: Path) -> None:
    with Logger(tmp_path, QUIET) as log:
        with pytest.raises(TypeError, match=r"'train/loss' must be a number, not str"):
            log.log_metrics(1, {"train/loss": "low"})  # type: ignore[dict-item]
        with pytest.raises(ValueError, match="'step'"):
            log.log_metrics(1, {"step": 2})
    assert read_jsonl(tmp_path / METRICS_FILE) == []


def _write_run(directory: Path, steps: range, resume_step: int | None) -> None:
    with Logger(directory, QUIET, resume_step=resume_step) as log:
        for step in steps:
            log.log_metrics(step, {"train/loss": 1 / step})
            if step % 2 == 0:
                log.log_metrics(step, {"val/accuracy": step / 10})
                log.log_samples(step, [{"prompt": "1+1=", "completion": str(step), "reward": 0.0}])


def test_resumed_run_has_the_same_files(tmp_path: Path) -> None:
    resumed, uninterrupted = tmp_path / "resumed", tmp_path / "uninterrupted"
    for directory in (resumed, uninterrupted):
        directory.mkdir()
    _write_run(uninterrupted, range(1, 9), None)
    _write_run(resumed, range(1, 8), None)
    with (resumed / METRICS_FILE).open("a") as file:
        file.write('{"step": 8, "train/lo')  # killed during a write
    _write_run(resumed, range(5, 9), resume_step=4)
    for name in (METRICS_FILE, SAMPLES_FILE):
        assert (resumed / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert not [path for path in resumed.iterdir() if path.name.startswith(".")]


def test_restart_drops_all_records(tmp_path: Path) -> None:
    _write_run(tmp_path, range(1, 5), None)
    with Logger(tmp_path, QUIET):
        pass
    assert read_jsonl(tmp_path / METRICS_FILE) == []
    assert read_jsonl(tmp_path / SAMPLES_FILE) == []


def test_sigkill_leaves_readable_metrics(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from nemo_rl.observability.logger import Logger
from nemo_rl.observability.logger_config import LoggerConfig
log = Logger(Path({str(tmp_path)!r}), LoggerConfig(tensorboard=False))
step = 0
while True:
    step += 1
    log.log_metrics(step, {{f"train/{{i}}": float(step) for i in range(200)}})
    if step == 50:
        print("go", flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    steps = [record["step"] for record in read_jsonl(tmp_path / METRICS_FILE)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 50
    with Logger(tmp_path, QUIET, resume_step=50) as log:
        log.log_metrics(51, {"train/0": 0.0})
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 52))


def test_backends_receive_metrics_in_order(tmp_path: Path, register: Callable[[Memory], None]) -> None:
    backend = Memory()
    register(backend)
    with Logger(tmp_path, QUIET) as log:
        log.log_hyperparameters({"policy": {"lr": 0.1}})
        for step in range(100):
            log.log_metrics(step, {"train/loss": float(step)})
    assert backend.metrics == [(step, {"train/loss": float(step)}) for step in range(100)]
    assert backend.parameters == {"policy.lr": 0.1}
    assert backend.closed


def test_failing_backend_is_disabled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, register: Callable[[Memory], None]
) -> None:
    def fail() -> None:
        raise ConnectionError("no route to host")

    register(Memory(fail))
    with Logger(tmp_path, QUIET) as log:
        for step in range(5):
            log.log_metrics(step, {"train/loss": 1.0})
    assert len(read_jsonl(tmp_path / METRICS_FILE)) == 5
    errors = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    assert errors == ["logger.memory is disabled for the rest of the run: ConnectionError: no route to host"]


def test_hanging_backend_does_not_block(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    register: Callable[[Memory], None],
) -> None:
    monkeypatch.setattr(logger_module, "_CLOSE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(logger_module, "_MAX_QUEUED", 10)
    forever = threading.Event()
    register(Memory(lambda: forever.wait() and None))
    with Logger(tmp_path, QUIET) as log:
        for step in range(50):
            log.log_metrics(step, {"train/loss": 1.0})
    assert len(read_jsonl(tmp_path / METRICS_FILE)) == 50
    assert [r.message for r in caplog.records] == [
        "logger.memory is disabled for the rest of the run: it is 10 records behind"
    ]
    forever.set()


def test_failing_listener_is_disabled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("no terminal")

    with Logger(tmp_path, QUIET, listeners=[Memory(fail)]) as log:
        for step in range(3):
            log.log_metrics(step, {"train/loss": 1.0})
    assert [r.message for r in caplog.records] == ["Memory failed and is disabled for the rest of the run"]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LoggerConfig(wandb=WandbConfig(enabled=True)), "wandb"),
        (LoggerConfig(mlflow=MlflowConfig(enabled=True)), "mlflow"),
    ],
)
def test_missing_package_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: LoggerConfig, name: str
) -> None:
    monkeypatch.setattr(logger_backends, "_is_installed", lambda package: package != name)
    with pytest.raises(ConfigError, match=rf"uv run --extra {name} \.\.\."):
        Logger(tmp_path, config)


def test_backend_open_error_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: RunInfo) -> Memory:
        raise PermissionError("api key is not valid")

    monkeypatch.setitem(BACKENDS, "memory", BackendEntry(lambda config: True, refuse))
    with pytest.raises(ConfigError, match=r"logger\.memory .* api key is not valid"):
        Logger(tmp_path, QUIET)


def test_tensorboard_reads_the_event_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Logger(tmp_path, LoggerConfig()) as log:
        log.log_hyperparameters({"grpo": {"seed": 7}})
        for step in range(1, 7):
            log.log_metrics(step, {"train/reward": step / 10})
    with Logger(tmp_path, LoggerConfig(), resume_step=4) as log:
        log.log_metrics(5, {"train/reward": 0.9})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("train/reward")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 0.4),
        (5, 0.9),
    ]
    (text,) = events.Tensors("config/text_summary")
    assert b"grpo.seed: 7" in text.tensor_proto.string_val[0]


def test_logger_import_loads_no_backend() -> None:
    heavy = "('torch', 'tensorboard', 'wandb', 'mlflow', 'ray')"
    code = f"import sys, nemo_rl.observability.logger; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
