"""Console output on a terminal and in a pipe."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nemo_rl.observability.console import ConsoleView, format_duration, sparkline
from nemo_rl.observability.timer import Timeline

STEP = {
    "train/reward": 0.4125,
    "train/completion_length": 14.2,
    "train/loss": 0.1,
    "perf/tokens_per_s": 2315.4,
    "timing/reward_s": 0.01,
    "timing/generation_s": 0.8,
    "timing/generation/prefill_s": 0.1,
    "timing/step_s": 1.3,
}


def test_pipe_output_has_one_line_per_event(tmp_path: Path) -> None:
    stream = io.StringIO()
    with ConsoleView("run [1]", 200, Console(file=stream, width=40)) as view:
        with Timeline(tmp_path, view).phase("ray"):
            pass
        view.log_metrics(0, {"val/accuracy": 0.5, "val/pass@2": 0.75, "timing/validation_s": 3.0})
        view.log_metrics(1, STEP)
        view.log_metrics(1, {"val/accuracy": 0.25})
        view.log_metrics(0, {"eval/accuracy": 0.5, "eval/maj@4": 0.625, "eval/num_failed": 0})
        view.log_metrics(200, {"train/reward": 1.0})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "start-up  ray: 0.0 s"
    assert lines[1] == "validation at step 0: accuracy 0.500  pass@2 0.750  (best 0.500)"
    assert lines[2].startswith(
        "step   1/200  reward 0.412  length 14.2  2,315 tokens/s  1.30 s (generation 0.80, reward 0.01)  ETA "
    )
    assert lines[3] == "validation at step 1: accuracy 0.250  (best 0.500)"
    assert lines[4] == "evaluation of step 0: accuracy 0.500  maj@4 0.625"
    assert lines[5] == "step 200/200  reward 1.000"


def test_supervised_training_shows_its_losses() -> None:
    stream = io.StringIO()
    with ConsoleView("sft", 0, Console(file=stream)) as view:
        view.set_max_num_steps(20)
        view.log_metrics(0, {"val/loss": 0.5})
        view.log_metrics(1, {"train/loss": 0.25, "train/grad_norm": 1.0})
        view.log_metrics(1, {"val/loss": 0.75})
    assert stream.getvalue().splitlines() == [
        "validation at step 0: loss 0.500  (best 0.500)",
        "step  1/20  loss 0.2500  ETA 0 s",
        "validation at step 1: loss 0.750  (best 0.500)",
    ]


CODE = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="LOG %(message)s", stream=sys.stderr)
from nemo_rl.observability.console import ConsoleView
with ConsoleView("the title", 10) as view:
    view.phase_started("venvs", "driver")
    logging.info("one message")
    print("one print")
    view.phase_ended("venvs", "driver", 1.5)
    view.log_metrics(1, {"train/reward": 0.25, "timing/step_s": 1.0, "timing/train_s": 0.5})
    view.log_metrics(1, {"val/accuracy": 0.875})
logging.info("after")
"""


def test_terminal_shows_panel_and_messages() -> None:
    parent, terminal = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", CODE],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
    )
    os.close(terminal)
    output = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        output += part
    assert child.wait() == 0
    os.close(parent)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode()).replace("\r", "")
    text = text.replace("╯", "╯\n")  # without cursor moves, text drawn over the panel follows it
    last_panel = text[text.rindex("the title") :]
    for expected in ("step 1 of 10", "reward", "0.250", "validation at step 1: accuracy 0.875", "train", "0.50 s"):
        assert expected in last_panel
    # Messages are neither overwritten nor lost.
    for message in ("LOG one message", "one print", "LOG after"):
        assert [line for line in text.splitlines() if line.strip() == message] == [message]


@pytest.mark.parametrize(
    ("values", "expected"), [([], ""), ([1.0], "▁"), ([1, 1], "▁▁"), ([0, 0.5, 1], "▁▅█"), ([3, -1], "█▁")]
)
def test_sparkline(values: list[float], expected: str) -> None:
    assert sparkline(values) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1m00s"), (200, "3m20s"), (7505, "2h05m")]
)
def test_format_duration(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected


@pytest.mark.parametrize("where", ["a pipe without a reader", "a full disk"])
def test_run_continues_without_output(where: str) -> None:
    program = (
        "import sys\n"
        "from nemo_rl.observability.console import ConsoleView\n"
        "with ConsoleView('run', 3) as view:\n"
        "    for step in (1, 2, 3):\n"
        "        view.log_metrics(step, {'train/reward': 0.5})\n"
        "print('done', file=sys.stderr)\n"
    )
    reader, writer = os.pipe() if where.startswith("a pipe") else (-1, os.open("/dev/full", os.O_WRONLY))
    if reader >= 0:
        os.close(reader)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=400, check=False)
    os.close(writer)
    warning, last = done.stderr.splitlines()
    assert (done.returncode, last) == (0, "done"), done.stderr
    assert "the run continues" in warning
