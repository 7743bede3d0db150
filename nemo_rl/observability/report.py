"""Writes `report.html`, a one-page report of a run, from the files in its directory.

`python -m nemo_rl.observability.report DIR` writes it at any time, also while the job runs or after it was killed. If a
file is missing, its section is left out. Incomplete lines are skipped. The page does not refer to other files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import nemo_rl
from nemo_rl.errors import ConfigError
from nemo_rl.observability import report_figures as figures
from nemo_rl.observability.console import format_duration
from nemo_rl.observability.critical_path import Segment, critical_path, startup_events
from nemo_rl.observability.logger import EPISODES_FILE, METRICS_FILE, SAMPLES_FILE
from nemo_rl.observability.report_conversations import accounts, conversations, shortened
from nemo_rl.observability.rollout_files import ATTESTATION_FILE
from nemo_rl.observability.timer import read_timeline
from nemo_rl.secrets import mask_secrets
from nemo_rl.utils.files import write_atomically
from nemo_rl.utils.jsonl import iterate_jsonl, read_jsonl

if TYPE_CHECKING:
    from jinja2 import Template

REPORT_FILE = "report.html"
SCORES_FILE = "scores.json"  # of an evaluation
EVALUATION_DIRECTORY = "eval"  # of a run: what the evaluation in the background writes

_MAX_SAMPLES = 24
_SECTIONS = (
    ("learning", "Learning"),
    ("evaluation", "Evaluation"),
    ("environments", "Environments"),
    ("phases", "Time"),
    ("panels", "Health"),
    ("startup", "Start-up"),
    ("samples", "Completions"),
    ("conversations", "Episodes"),
    ("workers", "Workers"),
    ("config", "Configuration"),
)
_ANCHORS = {"phases": "time", "panels": "health"}


@dataclass(frozen=True)
class Tile:
    """Holds a headline number of the report."""

    value: str
    label: str


def write_report(directory: Path) -> Path:
    """Write `directory/report.html`, atomically, and return its path.

    Raises:
        ConfigError: the directory is not a run directory.
    """
    if not any((directory / name).exists() for name in (METRICS_FILE, "config.yaml")):
        raise ConfigError(f"{directory} is not a run directory: it has neither {METRICS_FILE} nor config.yaml")
    target = directory / REPORT_FILE
    write_atomically(target, render(directory))
    return target


def render(directory: Path) -> str:
    """Return the page as HTML."""
    metrics = [record for record in read_jsonl(directory / METRICS_FILE) if isinstance(record.get("step"), int)]
    finished = _read_json(directory / "finished.json")
    samples = read_jsonl(directory / SAMPLES_FILE)
    evaluation = _read_json(directory / EVALUATION_DIRECTORY / SCORES_FILE) or {"models": [], "not_evaluated": []}
    context: dict[str, Any] = {
        "title": " / ".join(directory.resolve().parts[-2:]),
        "version": nemo_rl.__version__,
        "finished": bool(finished),
        "status": _status(finished, metrics),
        "learning": figures.learning_curve(metrics),
        "evaluation": figures.score_curves({model["step"]: model["scores"] for model in evaluation["models"]}),
        "not_evaluated": evaluation["not_evaluated"],
        "environments": figures.environment_curves(metrics),
        "accounts": accounts(iterate_jsonl(directory / EPISODES_FILE)),
        "phases": figures.phase_durations(metrics),
        "phase_summary": _phase_summary(metrics),
        "panels": figures.panels(metrics),
        "config": _config(directory / "config.yaml"),
        "workers": list(_workers(_read_json(directory / ATTESTATION_FILE))),
        **_startup(directory),
        **_samples([record for record in samples if "messages" not in record]),
        "conversations": conversations(samples),
    }
    context["tiles"] = _tiles(metrics, context["startup_s"])
    context["contents"] = [(_ANCHORS.get(key, key), name) for key, name in _SECTIONS if context[key]]
    return report_template("nemo_rl.observability").render(context)


def report_template(package: str, name: str = "report_template.html") -> Template:
    """Load a template of a package. It may extend `report_page.html`, the frame of all reports."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, package_path="") for name in (package, "nemo_rl.observability")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(name)


def main(arguments: Sequence[str]) -> int:
    """Run `python -m nemo_rl.observability.report DIR`. Returns the exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m nemo_rl.observability.report DIR\n")
        return 2
    try:
        path = write_report(Path(arguments[0]))
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{path}\n")
    return 0


def _status(finished: Any, metrics: Sequence[Mapping[str, Any]]) -> str:
    if finished:
        return f"finished: {finished.get('reason', '')}"
    last = max((record["step"] for record in metrics), default=0)
    return f"not finished; last logged step: {last}"


def _tiles(metrics: Sequence[Mapping[str, Any]], startup_s: float) -> list[Tile]:
    tiles = []
    for name, label, form in (
        ("val/accuracy", "validation accuracy", "{:.3f}"),
        ("val/loss", "validation loss", "{:.3g}"),
        ("eval/accuracy", "evaluation accuracy", "{:.3f}"),
    ):
        values = figures.series(metrics, name).values
        if values:
            ends = [values[0], values[-1]] if len(values) > 1 else values
            tiles.append(Tile(" → ".join(map(form.format, ends)), label))
    steps = figures.series(metrics, "timing/step_s")
    if steps.steps:
        validation_s = sum(figures.series(metrics, "timing/validation_s").values)
        tiles.append(Tile(f"{len(set(steps.steps)):,}", f"steps of {median(steps.values):.2f} s"))
        tiles.append(Tile(format_duration(sum(steps.values) + validation_s), "training time"))
    for name, label in (("perf/samples_per_s", "samples per second"), ("perf/tokens_per_s", "tokens per second")):
        values = figures.series(metrics, name).values
        if values:
            tiles.append(Tile(f"{median(values):,.0f}", label))
    if startup_s:
        tiles.append(Tile(f"{startup_s:.1f} s", "start-up"))
    return tiles


def _phase_summary(metrics: Sequence[Mapping[str, Any]]) -> str:
    total_s = sum(figures.series(metrics, "timing/step_s").values)
    if not total_s:
        return ""
    shares = [
        f"{name} {sum(figures.series(metrics, f'timing/{name}_s').values) / total_s:.0%}"
        for name in figures.phase_names([record for record in metrics if "timing/step_s" in record])
    ]
    return f"Over the run: {', '.join(shares[:5])}." if shares else ""


def _startup(directory: Path) -> dict[str, Any]:
    events, end = startup_events(read_timeline(directory))
    path = critical_path(events, end)
    zero = path[0].start if path else 0.0
    return {
        "startup": figures.startup_chart(events, path),
        "startup_s": path[-1].end - zero if path else 0.0,
        "longest_s": max((segment.duration_s for segment in path), default=0.0),
        "critical": [_critical_row(segment, zero) for segment in path],
    }


def _critical_row(segment: Segment, zero: float) -> dict[str, Any]:
    return {
        "name": segment.name,
        "process": segment.process,
        "start_s": segment.start - zero,
        "duration_s": segment.duration_s,
    }


def _samples(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return prompts with their completions at the first and the last logged step; one column if they are the same."""
    usable = [r for r in records if isinstance(r.get("step"), int) and isinstance(r.get("reward"), (int, float))]
    if not usable:
        return {"samples": [], "samples_before": 0, "samples_after": 0}
    before, after = min(r["step"] for r in usable), max(r["step"] for r in usable)
    columns = [{str(r["prompt"]): r for r in reversed(usable) if r["step"] == step} for step in sorted({before, after})]
    prompts = list(dict.fromkeys(str(r["prompt"]) for r in usable if r["step"] in (before, after)))
    rows = [
        {"prompt": shortened(prompt), "completions": [_completion(column.get(prompt)) for column in columns]}
        for prompt in prompts[:_MAX_SAMPLES]
    ]
    return {"samples": rows, "samples_before": before, "samples_after": after}


def _completion(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return {"reward": record["reward"], "completion": shortened(str(record.get("completion", "")))}


def _workers(content: Any, group: str = "") -> Iterator[dict[str, Any]]:
    """Yield table rows for the attestation records of all worker groups. Records may be nested at any depth."""
    if isinstance(content, list):
        for item in content:
            yield from _workers(item, group)
    elif isinstance(content, dict) and "fqn" in content:
        digest = content.get("venv_digest")
        yield {
            "group": group,
            "fqn": content["fqn"],
            "class_name": str(content["fqn"]).rpartition(".")[2],
            "node": content.get("hostname") or content.get("node_ip", ""),
            "pid": content.get("pid", ""),
            "venv": str(digest)[:12] if digest else "the driver's",
            "executable": content.get("executable", ""),
            "python": content.get("python", ""),
            "ray": content.get("ray", ""),
            "status": content.get("verdict", "ok"),
        }
    elif isinstance(content, dict):
        for name, item in content.items():
            yield from _workers(item, str(name))


def _config(path: Path) -> str:
    import yaml

    if not path.exists():
        return ""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError:
        return "config.yaml cannot be read"  # it may be truncated; the rest of the report is still useful
    return yaml.safe_dump(mask_secrets(content), sort_keys=False, allow_unicode=True).rstrip()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
