"""Draws the report's figures as inline SVG, without external files, scripts or fonts."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from nemo_rl.observability.critical_path import Segment
from nemo_rl.observability.timer import DRIVER, TimelineEvent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
BLUE, ORANGE, PALE = "#2563eb", "#ea580c", "#cbd5e1"
PHASE_COLORS = ("#2563eb", "#ea580c", "#059669", "#7c3aed", "#d97706", "#db2777", "#0891b2", "#65a30d")
WIDTH_IN = 9.6

# Metric, title. Metrics that the run did not log have no panel.
PANELS = (
    ("train/kl_to_teacher", "KL to the teacher, nats per token"),
    ("train/teacher_logprob", "Log-probability under the teacher, nats per token"),
    ("train/kl", "KL to the reference"),
    ("train/approx_kl", "KL of one step"),
    ("train/completion_length", "Completion length, tokens"),
    ("train/truncated", "Truncated at the length limit"),
    ("train/entropy_estimate", "Entropy, nats per token"),
    ("train/grad_norm", "Gradient norm"),
    ("train/groups_with_signal", "Groups with reward signal"),
    ("train/logprob_error", "Logprob error, generation vs policy, nats"),
    ("perf/tokens_per_s", "Tokens per second"),
)


# Metric of an environment, title.
ENVIRONMENT_PANELS = (
    ("reward", "Reward"),
    ("turns", "Turns per episode"),
    ("failed", "Failed episodes, fraction"),
    ("cut_off", "Cut-off episodes, fraction"),
    ("step_s", "Seconds per turn in the environment"),
)


@dataclass(frozen=True)
class Series:
    """Holds the values of a metric at the steps that logged it."""

    steps: list[int]
    values: list[float]


def series(records: Sequence[Record], name: str) -> Series:
    """Return all finite values of a metric, in the order of the file."""
    points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float))]
    return Series([step for step, _ in points], [value for _, value in points])


def learning_curve(records: Sequence[Record]) -> str | None:
    """Plot the reward of the training batches and the accuracy on the validation problems, or the losses of both."""
    reward, accuracy = series(records, "train/reward"), series(records, "val/accuracy")
    if not reward.steps and not accuracy.steps:
        return _loss_curve(series(records, "train/loss"), series(records, "val/loss"))
    with _figure(3.5) as (figure, output):
        axes = figure.subplots()
        if reward.steps:
            axes.plot(reward.steps, reward.values, color=BLUE, linewidth=0.8, alpha=0.3)
            axes.plot(reward.steps, smoothed(reward.values), color=BLUE, linewidth=2, label="train reward, smoothed")
        if accuracy.steps:
            label = "validation accuracy"
            axes.plot(accuracy.steps, accuracy.values, "o-", color=ORANGE, linewidth=2, markersize=4, label=label)
            for index in {0, len(accuracy.steps) - 1}:
                _mark(axes, accuracy.steps[index], accuracy.values[index], f"{accuracy.values[index]:.3f}")
        values = reward.values + accuracy.values
        if min(values) >= 0 and max(values) <= 1:
            axes.set_ylim(0, 1.08)
        _finish(axes, xlabel="step")
    return output[0]


def _loss_curve(train: Series, validation: Series) -> str | None:
    """Plot the loss of supervised training, on a logarithmic axis."""
    if not train.steps and not validation.steps:
        return None
    with _figure(3.5) as (figure, output):
        axes = figure.subplots()
        axes.plot(train.steps, train.values, color=BLUE, linewidth=1.2, label="train loss, nats per token")
        if validation.steps:
            axes.plot(
                validation.steps, validation.values, "o-", color=ORANGE, linewidth=2, markersize=4, label="validation"
            )
            for index in {0, len(validation.steps) - 1}:
                _mark(axes, validation.steps[index], validation.values[index], f"{validation.values[index]:.3g}")
        if min(train.values + validation.values) > 0:
            axes.set_yscale("log")
        _finish(axes, xlabel="step")
    return output[0]


def environment_curves(records: Sequence[Record]) -> str | None:
    """Plot the metrics of environments with turns, a line per environment: solid in training, dashed in validation."""
    names = environment_names(records)
    logged = [
        (key, title)
        for key, title in ENVIRONMENT_PANELS
        if any(series(records, f"{part}/env_{name}/{key}").steps for part in ("train", "val") for name in names)
    ]
    if not logged:
        return None
    columns = min(3, len(logged))
    rows = -(-len(logged) // columns)
    with _figure(1.93 * rows + 0.27 * (1 + len(names) // 8)) as (figure, output):
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)  # type: ignore[union-attr, call-arg]
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (key, title) in zip(grid.flat, logged):
            lowest = 0.0
            for name, color in zip(names, itertools.cycle(PHASE_COLORS)):
                train, val = (series(records, f"{part}/env_{name}/{key}") for part in ("train", "val"))
                axes.plot(train.steps, train.values, color=color, linewidth=0.8, alpha=0.3)
                axes.plot(train.steps, smoothed(train.values), color=color, linewidth=1.6, label=name)
                axes.plot(val.steps, val.values, "o--", color=color, linewidth=1.2, markersize=3)
                lowest = min([lowest, *train.values, *val.values])
            if lowest == 0:
                axes.set_ylim(bottom=0)
            axes.set_title(title, loc="left", fontsize=9.5, color=INK)
            _finish(axes, legend=False)
        for axes in list(grid.flat)[len(logged) :]:
            axes.set_visible(False)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=8, frameon=False, handlelength=1.2)
    return output[0]


def score_bars(names: Sequence[str], models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str | None:
    """Plot scores as horizontal bars with their confidence intervals: a group for each name, a bar for each model.

    Args:
        names: metrics or subjects, from the top.
        models: by label of a model, its scores by name: `value`, `low` and `high`.
    """
    if not names or not models:
        return None
    with _figure(0.55 + len(names) * (0.2 + 0.2 * len(models))) as (figure, output):
        axes = figure.subplots()
        height = 0.8 / len(models)
        for index, ((label, scores), color) in enumerate(zip(models.items(), itertools.cycle(PHASE_COLORS))):
            shift = (index - (len(models) - 1) / 2) * height
            for row, score in enumerate(map(scores.get, names)):
                if score is None:
                    continue
                value, low, high = score["value"], score["low"], score["high"]
                axes.barh(row + shift, value, height * 0.9, color=color, alpha=0.85, label=label)
                label = "_"  # one entry of the legend per model
                if low is not None:
                    axes.plot([low, high], [row + shift] * 2, color=INK, linewidth=1.2, marker="|", markersize=5)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        _finish(axes)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=GRID, linewidth=0.8)
    return output[0]


def score_curves(scores: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> str | None:
    """Plot the fractions among the scores of evaluations by training step, with their 95 % confidence intervals.

    Args:
        scores: by training step, the scores by metric: `value`, `low` and `high`.
    """
    names = dict.fromkeys(name for each in scores.values() for name in each)
    curves = {
        name: {step: each[name] for step, each in sorted(scores.items()) if name in each}
        for name in names
        if name == "accuracy" or name.startswith(("pass@", "maj@"))
    }
    if "pass@1" in curves and "accuracy" in curves:
        del curves["pass@1"]  # equal, unless samples have failed
    if not curves:
        return None
    with _figure(3.1) as (figure, output):
        axes = figure.subplots()
        for (name, points), color in zip(curves.items(), itertools.cycle(PHASE_COLORS)):
            steps, values = [*points], [point["value"] for point in points.values()]
            axes.plot(steps, values, "o-", color=color, linewidth=1.6, markersize=4, label=name)
            lows, highs = ([point[end] for point in points.values()] for end in ("low", "high"))
            if None not in lows:
                axes.fill_between(steps, lows, highs, color=color, alpha=0.15, linewidth=0)
        axes.set_ylim(-0.02, 1.08)
        _finish(axes, xlabel="step")
    return output[0]


def environment_names(records: Sequence[Record]) -> list[str]:
    """Return the names of the environments whose metrics were logged, as train/env_NAME/METRIC."""
    matches = (re.fullmatch(r"(?:train|val)/env_([^/]+)/[^/]+", key) for record in records for key in record)
    return sorted({match[1] for match in matches if match})


def phase_durations(records: Sequence[Record]) -> str | None:
    """Plot the seconds per step, stacked by phase. Time outside all phases is labelled "other"."""
    steps = [record for record in records if isinstance(record.get("timing/step_s"), (int, float))]
    if not steps:
        return None
    x = [record["step"] for record in steps]
    totals = [float(record["timing/step_s"]) for record in steps]
    names = phase_names(steps)
    parts = [[float(record.get(f"timing/{name}_s") or 0.0) for record in steps] for name in names]
    other = [max(0.0, total - sum(column)) for total, column in zip(totals, zip(*parts))] if parts else totals
    with _figure(3.1) as (figure, output):
        axes = figure.subplots()
        base = [0.0] * len(x)
        layers = [*zip(names, parts, PHASE_COLORS * 9), ("other", other, PALE)]
        for name, values, color in layers:
            top = [b + v for b, v in zip(base, values)]
            axes.fill_between(x, base, top, step="mid", color=color, alpha=0.85, linewidth=0, label=name)
            base = top
        if len(x) == 1:
            axes.set_xlim(x[0] - 1, x[0] + 1)
        else:
            axes.set_xlim(x[0] - 0.5, x[-1] + 0.5)
        limit = 2.5 * median(totals)
        if max(totals) > limit:
            axes.set_ylim(0, limit)
            slowest = totals.index(max(totals))
            text = f"step {x[slowest]}: {totals[slowest]:.1f} s"
            axes.annotate(text, (x[slowest], limit), xytext=(6, -12), textcoords="offset points", color=MUTED)
        _finish(axes, xlabel="step", ylabel="seconds")
    return output[0]


def phase_names(records: Sequence[Record]) -> list[str]:
    """Return the top-level phases of a step, longest first."""
    totals: dict[str, float] = {}
    for record in records:
        for key, value in record.items():
            match = re.fullmatch(r"timing/([^/]+)_s", key)
            if match and match[1] not in ("step", "validation") and isinstance(value, (int, float)):
                totals[match[1]] = totals.get(match[1], 0.0) + value
    return sorted((name for name, total in totals.items() if total > 0), key=lambda name: -totals[name])


def panels(records: Sequence[Record]) -> str | None:
    """Plot the metrics that show whether training is healthy, in small panels."""
    logged = [(title, curve) for name, title in PANELS if (curve := series(records, name)).steps]
    if not logged:
        return None
    columns = 3
    rows = -(-len(logged) // columns)
    with _figure(1.85 * rows) as (figure, output):
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)  # type: ignore[union-attr, call-arg]
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (title, curve) in zip(grid.flat, logged):
            marker = "o" if len(curve.steps) < 40 else ""
            axes.plot(curve.steps, curve.values, marker=marker, markersize=2.5, color=BLUE, linewidth=0.8, alpha=0.35)
            axes.plot(curve.steps, smoothed(curve.values), color=BLUE, linewidth=1.6)
            axes.set_title(title, loc="left", fontsize=9.5, color=INK)
            if min(curve.values) >= 0:
                axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
            _finish(axes, legend=False)
        for axes in list(grid.flat)[len(logged) :]:
            axes.set_visible(False)
    return output[0]


def startup_chart(events: Sequence[TimelineEvent], path: Sequence[Segment]) -> str | None:
    """Plot the events of a start-up: one row per process, nested events below each other, critical path in color."""
    if not path:
        return None
    zero, length = path[0].start, path[-1].end - path[0].start
    rows = _rows(events)
    with _figure(0.34 * (len(rows) + 1) + 0.75) as (figure, output):
        axes = figure.subplots()
        for number, (_, row) in enumerate(rows):
            for event in row:
                start, width = event.start - zero, event.duration_s
                axes.barh(number, width, left=start, height=0.74, color=PALE, edgecolor="white", linewidth=0.8)
                for piece in path:
                    if (piece.name, piece.process) == (event.name, event.process) and _within(piece, event):
                        axes.barh(
                            number, piece.duration_s, left=piece.start - zero, height=0.74, color=BLUE, alpha=0.35
                        )
                # A character is about 0.065 inch wide at this font size.
                if width / length * (WIDTH_IN - 1.6) > 0.065 * len(event.name):
                    axes.text(start + width / 2, number, event.name, ha="center", va="center", fontsize=8, color=INK)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, length * 1.002)
        _finish(axes, xlabel="seconds since the command", legend=False)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    return output[0]


def smoothed(values: Sequence[float]) -> list[float]:
    """Return centered moving averages over a fortieth of the run on either side. A centered average has no lag."""
    reach = len(values) // 40
    windows = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _rows(events: Sequence[TimelineEvent]) -> list[tuple[str, list[TimelineEvent]]]:
    """Arrange events in rows without overlaps, the driver's rows first. Only a process's first row is labelled."""
    by_process: dict[str, list[TimelineEvent]] = {}
    for event in sorted(events, key=lambda e: (e.start, -e.end)):
        by_process.setdefault(event.process, []).append(event)
    rows = []
    for process in sorted(by_process, key=lambda name: (not name.startswith(DRIVER), by_process[name][0].start, name)):
        lanes: list[list[TimelineEvent]] = []
        for event in by_process[process]:
            lane = next((lane for lane in lanes if lane[-1].end <= event.start), None)
            if lane is None:
                lanes.append([event])
            else:
                lane.append(event)
        rows += [(process if index == 0 else "", lane) for index, lane in enumerate(lanes)]
    return rows


def _within(piece: Segment, event: TimelineEvent) -> bool:
    return event.start <= piece.start and piece.end <= event.end


def _mark(axes: Axes, x: float, y: float, text: str) -> None:
    style = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "fontsize": 9, "fontweight": "bold"}
    axes.annotate(text, (x, y), color=ORANGE, **style)  # type: ignore[arg-type]


def _finish(axes: Axes, xlabel: str = "", ylabel: str = "", legend: bool = True) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=8, frameon=False, handlelength=1.2)


@contextmanager
def _figure(height_in: float) -> Iterator[tuple[Figure, list[str]]]:
    """Create a figure in the report's style. Its SVG is appended to the list when the block ends."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": PALE,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        # SVG ids must be unique within the page.
        "svg.hashsalt": f"nemo-rl-{height_in}",
    }
    output: list[str] = []
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        yield figure, output
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        output.append(_for_page(buffer.getvalue()))


def _for_page(svg: str) -> str:
    """Extract the svg element and make it as wide as its container."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%"', svg, count=1, flags=re.DOTALL)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
