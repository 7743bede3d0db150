"""Keeps the rollouts of a run: `rollouts/step_000012.parquet` for each training step, with one row per
transcript: one for each sample, more for those with branches.

docs/logging.md describes the columns. A reader sees complete files only, except after a power failure.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl.errors import ConfigError, DataError
from nemo_rl.utils.files import write_atomically

if TYPE_CHECKING:
    import pyarrow

ROLLOUTS_DIRECTORY = "rollouts"
ATTESTATION_FILE = "attestation.json"

# Columns of few different values. A dictionary of the others would make files larger and slower to write.
_REPETITIVE = ["environment", "problem", "end", "outcome", "failure", "venv_digest"]


class RolloutFiles:
    """Writes the rollouts of a run and removes the oldest beyond a size limit. Not thread-safe.

    Example::

        files = RolloutFiles(directory, limit_mb=1024, resume_step=None)
        files.write(1, [{"environment": "nim", "reward": 1.0, "messages": [...]}])
    """

    def __init__(self, directory: Path, *, limit_mb: int, resume_step: int | None) -> None:
        """Remove the files of steps after `resume_step`; all files if it is None.

        Args:
            directory: the run's directory.
            limit_mb: size limit of all files, in MB. The newest file is kept in any case. 0: write none.
            resume_step: step of the checkpoint from which the run resumes.
        """
        self._directory, self._limit = directory, limit_mb * 1_000_000
        self._sizes: dict[Path, int] = {}  # oldest first
        for step, path in find_rollouts(directory).items():
            if resume_step is None or step > resume_step:
                path.unlink()
            else:
                self._sizes[path] = path.stat().st_size
        self._digests: dict[str, str | None] | None = None

    def write(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write the samples of a step. A column that a sample does not have is null."""
        if not self._limit:
            return
        import pyarrow
        import pyarrow.parquet

        if self._digests is None:
            self._digests = _environment_digests(self._directory)
        schema = _schema()
        columns: dict[str, list[Any]] = {name: [sample.get(name) for sample in samples] for name in schema.names}
        columns["step"] = [step] * len(samples)
        columns["venv_digest"] = [self._digest(name) for name in columns["environment"]]
        columns["messages"] = [json.dumps(messages) for messages in columns["messages"]]
        columns["failure"] = [text.encode(errors="replace").decode() for text in columns["failure"]]
        buffer = io.BytesIO()
        table = pyarrow.Table.from_pydict(columns, schema)
        pyarrow.parquet.write_table(table, buffer, compression="zstd", use_dictionary=_REPETITIVE)
        path = self._directory / ROLLOUTS_DIRECTORY / f"step_{step:06d}.parquet"
        write_atomically(path, buffer.getvalue(), durable=False)  # waiting for the disk would triple the cost
        self._sizes.pop(path, None)
        self._sizes[path] = buffer.tell()
        while sum(self._sizes.values()) > self._limit and len(self._sizes) > 1:
            oldest = next(iter(self._sizes))
            oldest.unlink(missing_ok=True)
            del self._sizes[oldest]

    def _digest(self, environment: str) -> str | None:
        digests = self._digests or {}
        return digests.get(f"environment {environment}", digests.get("environment"))


def find_rollouts(directory: Path) -> dict[int, Path]:
    """Return the files of a run by training step, in the order of the steps."""
    files = {}
    for path in (directory / ROLLOUTS_DIRECTORY).glob("step_*.parquet"):
        match = re.fullmatch(r"step_(\d+)\.parquet", path.name)
        if match:
            files[int(match[1])] = path
    return dict(sorted(files.items()))


def open_rollouts(directory: Path) -> dict[int, Path]:
    """Return what `find_rollouts` returns.

    Raises:
        ConfigError: the directory has no rollouts.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory; name the directory of a run, such as results/CONFIG/001")
    files = find_rollouts(directory)
    if files:
        return files
    if not (directory / "config.yaml").exists():
        raise ConfigError(f"{directory} is not the directory of a run: it has neither config.yaml nor rollouts")
    raise ConfigError(
        f"{directory / ROLLOUTS_DIRECTORY} has no rollouts: the run has not finished a step, or has "
        "logger.max_rollouts_mb=0"
    )


def read_rollouts(paths: Sequence[Path], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the files, with messages as a list. A file that a running job has removed has none.

    A column that a file of an older version does not have is None.

    Raises:
        DataError: a file is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    for path in paths:
        try:
            table = pyarrow.parquet.read_table(path, columns=list(columns), schema=_schema(), partitioning=None)
            rows = table.to_pylist()
        except FileNotFoundError:
            continue
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read ({error}); remove it to read the other steps") from error
        for row in rows:
            if "messages" in row:
                row["messages"] = json.loads(row["messages"])
            yield row


def message_text(message: Mapping[str, Any]) -> str:
    """Return what a chat message says: its content, and its tool calls as JSON.

    Example:
        >>> message_text({"role": "assistant", "content": "", "tool_calls": [{"name": "now"}]})
        '{"name": "now"}'
    """
    content = message.get("content")
    parts = [content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)] if content else []
    parts += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join(parts)


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    return pa.schema(
        {
            "step": pa.int32(),
            "environment": pa.string(),
            "problem": pa.string(),
            "sample": pa.int32(),
            "branch": pa.int32(),
            "group": pa.int32(),
            "tokens": pa.list_(pa.int32()),
            "token_mask": pa.list_(pa.bool_()),
            "generation_logprobs": pa.list_(pa.float32()),
            "num_tokens": pa.int32(),
            "turns": pa.int32(),
            "reward": pa.float64(),
            "advantage": pa.float32(),
            "token_advantages": pa.list_(pa.float32()),
            "sample_mask": pa.bool_(),
            "end": pa.string(),
            "outcome": pa.string(),
            "failure": pa.string(),
            "attempts": pa.int32(),
            "messages": pa.string(),
            "weights_version": pa.int32(),
            "venv_digest": pa.string(),
        }
    )


def _environment_digests(directory: Path) -> dict[str, str | None]:
    """Return the venv digest of each worker group; None if its workers differ, or run code in a child process."""
    try:
        records = json.loads((directory / ATTESTATION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    digests: dict[str, set[str | None]] = {}
    for record in records:
        digest = None if "child" in record else record.get("venv_digest")
        digests.setdefault(record["group"], set()).add(digest)
    return {group: values.pop() if len(values) == 1 else None for group, values in digests.items()}
