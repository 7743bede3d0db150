"""Phase timers and the timeline."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_rl.observability.timer import FIRST_STEP, TIMELINE_FILE, Timeline, TimelineEvent, Timer, read_timeline


def test_nested_phases() -> None:
    timer = Timer()
    with timer.phase("step"):
        with timer.phase("generation"):
            time.sleep(0.02)
        with timer.phase("train"), timer.phase("train/backward"):
            time.sleep(0.01)
    seconds = timer.seconds()
    assert list(seconds) == ["generation", "train/backward", "train", "step"]
    assert seconds["generation"] >= 0.02
    assert seconds["train"] >= seconds["train/backward"] >= 0.01
    assert seconds["step"] >= seconds["generation"] + seconds["train"]
    assert timer.metrics()["timing/train/backward_s"] == seconds["train/backward"]


def test_repeated_phases_add_up() -> None:
    timer = Timer()
    for _ in range(3):
        with timer.phase("reward"):
            time.sleep(0.005)
    assert timer.seconds()["reward"] >= 0.015
    timer.reset()
    assert timer.seconds() == {}


def test_raising_phase_counts() -> None:
    timer = Timer()
    with pytest.raises(RuntimeError), timer.phase("train"):
        raise RuntimeError
    assert "train" in timer.seconds()
    with timer.phase("train"):  # the phase can be entered again
        pass


def test_recursive_phase_is_refused() -> None:
    timer = Timer()
    with timer.phase("step"), pytest.raises(ValueError, match="'step' is already open"), timer.phase("step"):
        pass


def test_timeline_keeps_all_processes_and_starts(tmp_path: Path) -> None:
    first = Timeline(tmp_path)
    with pytest.raises(RuntimeError), first.phase("ray"):
        raise RuntimeError
    first.extend([TimelineEvent("import torch", "policy-0", "node-7", 1.0, 3.5)])
    second = Timeline(tmp_path)
    second.mark_first_step()
    events = read_timeline(tmp_path)
    assert [(e.name, e.process, e.life) for e in events] == [
        ("import torch", "policy-0", 1),
        ("ray", "driver", 1),
        (FIRST_STEP, "driver", 2),
    ]
    assert events[0].node == "node-7"
    assert events[0].duration_s == 2.5
    assert events[1].node == socket.gethostname()
    assert abs(events[2].end - time.time()) < 60


def test_timeline_records_process_start(tmp_path: Path) -> None:
    code = f"""
import time; time.sleep(0.3)
from pathlib import Path
from nemo_rl.observability.timer import Timeline
Timeline(Path({str(tmp_path)!r})).record_process_start()
"""
    before = time.time()
    subprocess.run([sys.executable, "-c", code], check=True)
    (event,) = [e for e in read_timeline(tmp_path) if e.name == "Python and imports"]
    assert before - 0.5 <= event.start < event.end <= time.time()
    assert event.duration_s >= 0.3


def test_incomplete_timeline_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / TIMELINE_FILE
    Timeline(tmp_path).record("a", 1.0, 2.0)
    path.write_bytes(path.read_bytes() + b'{"name": "b", "proc')
    Timeline(tmp_path).record("c", 3.0, 4.0)
    assert [event.name for event in read_timeline(tmp_path)] == ["a", "c"]
    path.write_text(json.dumps({"name": "d"}) + "\n")
    assert read_timeline(tmp_path) == []
    assert read_timeline(tmp_path / "nowhere") == []


def test_concurrent_writers_do_not_mix_lines(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from nemo_rl.observability.timer import Timeline
import sys
timeline = Timeline(Path({str(tmp_path)!r}))
for i in range(200):
    timeline.record("x" * 500, i, i + 1, process=sys.argv[1])
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(k)]) for k in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    events = read_timeline(tmp_path)
    assert len(events) == 600
    assert {event.process for event in events} == {"0", "1", "2"}
