"""Writes `report.html`, a one-page summary of a pipeline run, from the files in its run directory."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo_rl
from nemo_rl.errors import ConfigError
from nemo_rl.observability.console import format_duration
from nemo_rl.observability.report import report_template
from nemo_rl.pipelines.failures import FailedTask, failed_tasks
from nemo_rl.pipelines.progress import Counts
from nemo_rl.pipelines.run_directory import RECORD_FILE, STAGES_FILE
from nemo_rl.utils.files import write_atomically

REPORT_FILE = "report.html"
_MAX_FAILURES = 20
_MAX_CHARS = 1200


@dataclass(frozen=True)
class StageRow:
    """Holds one row of the stage table. `share` is the stage's time in percent of the slowest stage's time."""

    name: str
    counts: Counts
    share: float

    @property
    def items_per_s(self) -> float:
        return self.counts.items_in / self.counts.busy_s if self.counts.busy_s else 0.0

    @property
    def num_dropped(self) -> int:
        return sum(dropped.count for dropped in self.counts.dropped.values())


def write_report(run_dir: Path, target: Path | None = None, *, title: str = "", summary: str = "") -> Path:
    """Write the report of a finished run atomically and return its path.

    Args:
        run_dir: directory of the run.
        target: file to write; defaults to `run_dir/report.html`.
        title: defaults to the pipeline's name.
        summary: text below the title.

    Raises:
        ConfigError: the directory does not hold a run that has ended, or its files are damaged.
    """
    if not (run_dir / STAGES_FILE).exists():
        raise ConfigError(f"{run_dir} does not hold a pipeline run that has ended: {STAGES_FILE} is missing")
    path = target or run_dir / REPORT_FILE
    write_atomically(path, render(run_dir, title=title, summary=summary))
    return path


def render(run_dir: Path, *, title: str = "", summary: str = "") -> str:
    """Return the page as HTML. Raises `ConfigError` if the run's files are missing or damaged."""
    record = _read_json(run_dir / RECORD_FILE)
    rows = _rows(_read_json(run_dir / STAGES_FILE))
    failed = failed_tasks(run_dir)
    ended = record.get("ended") or time.time()
    first = next((row for row in rows if row.counts.items_in), None)
    last = next((row for row in reversed(rows) if row.counts.items_in), None)
    tiles = [
        (f"{first.counts.items_out:,}" if first else "0", "read" if first else "items"),
        (f"{last.counts.items_in:,}" if last else "0", "left"),
        (f"{sum(row.num_dropped for row in rows):,}", "dropped"),
        (f"{len(failed):,}", "tasks failed"),
        (
            format_duration(ended - record["started"]),
            "wall time" + (", all attempts" if record["attempts"] > 1 else ""),
        ),
    ]
    return report_template("nemo_rl.pipelines").render(
        title=title or record["name"],
        summary=summary,
        record=record,
        tiles=tiles,
        rows=rows,
        failed=[_failure_row(task) for task in failed[:_MAX_FAILURES]],
        num_failed=len(failed),
        version=nemo_rl.__version__,
        shorten=_shorten,
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}. Run the pipeline again with this run_dir: what is done is kept, and the "
            "file is written again when the run ends"
        ) from None


def _rows(stages: list[dict[str, Any]]) -> list[StageRow]:
    named = [(stage.pop("stage"), Counts.from_plain(stage)) for stage in stages]
    longest = max((counts.busy_s for _, counts in named), default=0.0) or 1.0
    return [StageRow(name, counts, 100 * counts.busy_s / longest) for name, counts in named]


def _failure_row(failed: FailedTask) -> dict[str, str]:
    return {"stage": failed.stage, "task": failed.task_id, "error": _shorten(failed.error), "path": str(failed.path)}


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + "…"
