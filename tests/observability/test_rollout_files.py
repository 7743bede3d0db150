"""The rollouts that a run keeps as Parquet."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from nemo_rl.errors import ConfigError, DataError
from nemo_rl.observability.logger import Logger
from nemo_rl.observability.logger_config import LoggerConfig
from nemo_rl.observability.rollout_files import (
    ATTESTATION_FILE,
    RolloutFiles,
    find_rollouts,
    open_rollouts,
    read_rollouts,
)


def sample(number: int, environment: str = "nim", **values: Any) -> dict[str, Any]:
    return {
        "environment": environment,
        "problem": "7",
        "sample": number,
        "group": 0,
        "tokens": np.arange(3, dtype=np.int32),
        "token_mask": np.array([False, True, True]),
        "generation_logprobs": np.array([0.0, -0.5, -0.25], dtype=np.float32),
        "num_tokens": 3,
        "turns": 1,
        "reward": 0.5,
        "advantage": 1.0,
        "sample_mask": True,
        "end": "done",
        "outcome": "trained",
        "failure": "",
        "attempts": 1,
        "messages": [{"role": "user", "content": "go \ud800"}, {"role": "assistant", "content": "é", "reward": 0.5}],
        "weights_version": 4,
        **values,
    }


def write(directory: Path, steps: range, *, limit_mb: int = 1, resume_step: int | None = None, size: int = 1) -> None:
    files = RolloutFiles(directory, limit_mb=limit_mb, resume_step=resume_step)
    for step in steps:
        files.write(step, [sample(number) for number in range(size)])


def test_values_are_kept(tmp_path: Path) -> None:
    files = RolloutFiles(tmp_path, limit_mb=1, resume_step=None)
    files.write(
        12,
        [
            sample(0, failure="\ud800"),
            sample(1, tokens=None, token_mask=None, generation_logprobs=None, advantage=None),
        ],
    )
    table = pyarrow.parquet.read_table(tmp_path / "rollouts" / "step_000012.parquet")
    assert table.column("tokens").type == pyarrow.list_(pyarrow.int32())
    first, second = table.to_pylist()
    assert (first["tokens"], first["token_mask"]) == ([0, 1, 2], [False, True, True])
    assert first["generation_logprobs"] == [0.0, -0.5, -0.25]
    assert (first["step"], first["weights_version"], first["venv_digest"]) == (12, 4, None)
    assert json.loads(first["messages"]) == sample(0)["messages"]
    assert (second["tokens"], second["advantage"], second["reward"]) == (None, None, 0.5)


def test_venv_digest_of_the_environment(tmp_path: Path) -> None:
    records = [
        {"group": "policy", "venv_digest": "p"},
        {"group": "environment nim", "venv_digest": "a"},
        {"group": "environment nim", "venv_digest": "a"},
        {"group": "environment mixed", "venv_digest": "a"},
        {"group": "environment mixed", "venv_digest": "b"},
        {"group": "environment child", "venv_digest": "a", "child": {"python": "3.13"}},
    ]
    (tmp_path / ATTESTATION_FILE).write_text(json.dumps(records))
    names = ["nim", "mixed", "child"]
    RolloutFiles(tmp_path, limit_mb=1, resume_step=None).write(1, [sample(0, name) for name in names])
    rows = read_rollouts([*find_rollouts(tmp_path).values()], ["venv_digest"])
    assert [row["venv_digest"] for row in rows] == ["a", None, None]


def test_oldest_files_are_removed_beyond_the_limit(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random(60_000, dtype=np.float32)
    files = RolloutFiles(tmp_path, limit_mb=1, resume_step=None)
    for step in range(1, 9):
        files.write(step, [sample(0, generation_logprobs=noise)])
    kept = find_rollouts(tmp_path)
    total = sum(path.stat().st_size for path in kept.values())
    assert 600_000 < total <= 1_000_000
    assert list(kept) == list(range(9 - len(kept), 9))
    # A resumed run counts the files of the earlier process.
    files = RolloutFiles(tmp_path, limit_mb=1, resume_step=8)
    files.write(9, [sample(0, generation_logprobs=noise)])
    assert list(find_rollouts(tmp_path)) == [*list(kept)[1:], 9]


def test_newest_file_is_kept_in_any_case(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random(400_000, dtype=np.float32)
    files = RolloutFiles(tmp_path, limit_mb=1, resume_step=None)
    for step in (1, 2):
        files.write(step, [sample(0, generation_logprobs=noise)])
        assert list(find_rollouts(tmp_path)) == [step]


@pytest.mark.parametrize(("resume_step", "kept"), [(None, []), (3, [1, 2, 3])])
def test_resumed_run_drops_later_steps(tmp_path: Path, resume_step: int | None, kept: list[int]) -> None:
    write(tmp_path, range(1, 7))
    with Logger(tmp_path, LoggerConfig(tensorboard=False, max_rollouts_mb=0), resume_step=resume_step) as log:
        assert list(find_rollouts(tmp_path)) == kept
        log.log_rollouts(7, [sample(0)])  # the limit of 0 keeps none
    assert list(find_rollouts(tmp_path)) == kept


def test_sigkill_leaves_complete_files(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_rollout_files import write
write(Path({str(tmp_path)!r}), range(1, 4), size=200)
print("go", flush=True)
write(Path({str(tmp_path)!r}), range(4, 10**6), limit_mb=100, resume_step=3, size=200)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"go\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    files = find_rollouts(tmp_path)
    assert len(list(read_rollouts([*files.values()], ["sample"]))) == 200 * len(files)
    assert len(files) >= 3


def test_errors_name_the_directory_and_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a directory; name the directory of a run"):
        open_rollouts(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"neither config.yaml nor rollouts"):
        open_rollouts(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"logger.max_rollouts_mb=0"):
        open_rollouts(tmp_path)
    write(tmp_path, range(1, 3))
    path = find_rollouts(tmp_path)[2]
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"step_000002.parquet cannot be read .* remove it"):
        list(read_rollouts([path], ["step"]))


def test_removed_file_has_no_rows(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    paths = [*find_rollouts(tmp_path).values()]
    paths[0].unlink()
    assert [row["step"] for row in read_rollouts(paths, ["step"])] == [2]
