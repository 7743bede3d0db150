"""JSONL files after a kill or a power failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rl.utils.jsonl import append_text, iterate_jsonl, keep_lines, read_jsonl

LINES = [b'{"step": 1}\n', b'{"step": 2}\n', b'{"step": 3}\n']


@pytest.mark.parametrize("tail", ["cut", "zeros", "more zeros"])
def test_file_is_read_up_to_the_last_complete_line(tmp_path: Path, tail: str) -> None:
    content = b"".join(LINES)
    path = tmp_path / "metrics.jsonl"
    for size in range(len(content) + 1):
        padding = {"cut": 0, "zeros": len(content) - size, "more zeros": 4096}[tail]
        path.write_bytes(content[:size] + bytes(padding))
        steps = [record["step"] for record in read_jsonl(path)]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= size // len(LINES[0])
        append_text(path, '{"step": 9}\n')
        assert [record["step"] for record in read_jsonl(path)] == [*steps, 9]
        assert list(iterate_jsonl(path)) == read_jsonl(path)
        keep_lines(path, lambda record: record["step"] != 9)
        assert path.read_bytes() == b"".join(LINES[: len(steps)])


def test_missing_file_has_no_records(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "none.jsonl") == list(iterate_jsonl(tmp_path / "none.jsonl")) == []
