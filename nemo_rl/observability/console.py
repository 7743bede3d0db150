"""Shows the progress of a run: a live panel on a terminal, and one line per step elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

logger = logging.getLogger(__name__)

_SPARKS = "▁▂▃▄▅▆▇█"
_HISTORY = 40
_PHASE_BAR = 24
# Rows of the panel: metric, label, format. Metrics that the run does not log have no row.
_ROWS = (
    ("train/reward", "reward", "{:.3f}"),
    ("train/loss", "loss", "{:.4f}"),
    ("train/env_accuracy", "accuracy", "{:.3f}"),
    ("train/completion_length", "length", "{:.1f} tokens"),
    ("train/truncated", "truncated", "{:.1%}"),
    ("train/kl_to_teacher", "KL to teacher", "{:.4f}"),
    ("train/kl", "KL to reference", "{:.5f}"),
    ("train/approx_kl", "KL of the step", "{:.5f}"),
    ("train/entropy_estimate", "entropy", "{:.3f}"),
    ("train/grad_norm", "gradient norm", "{:.3f}"),
    ("train/logprob_error", "logprob error", "{:.2g}"),
    ("perf/tokens_per_s", "speed", "{:,.0f} tokens/s"),
)
_TOTALS = ("step", "validation")
_VALIDATION, _EVALUATION = "val/", "eval/"


class ConsoleView:
    """Shows start-up phases, steps and validations. Implements `Listener` and `PhaseListener`.

    Use it as a context manager. On a terminal, log messages and prints appear above the panel.

    Example::

        with ConsoleView("grpo", max_num_steps=100) as view, Logger(directory, config, listeners=[view]) as logger:
            logger.log_metrics(1, {"train/reward": 0.25, "timing/step_s": 1.8})
    """

    def __init__(self, title: str, max_num_steps: int, console: Console | None = None) -> None:
        self._title = title
        self._max_num_steps = max_num_steps
        self._console = console or Console(highlight=False)
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._is_closed = False
        self._moved_handlers: list[tuple[logging.StreamHandler[Any], IO[str]]] = []
        self._open_phases: dict[tuple[str, str], float] = {}
        self._done_phases: list[tuple[str, float]] = []
        self._step = 0
        self._metrics: dict[str, float] = {}
        self._history: dict[str, deque[float]] = {}
        self._validation: tuple[int, dict[str, float]] | None = None
        self._evaluation: tuple[int, dict[str, float]] | None = None
        self._best_accuracy, self._best_loss = float("-inf"), float("inf")
        self._clock: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        if self._console.is_interactive:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=False)
            self._live.start()
            self._move_log_handlers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        for handler, stream in self._moved_handlers:
            handler.setStream(stream)
        self._moved_handlers = []

    def set_max_num_steps(self, max_num_steps: int) -> None:
        """Set the number of steps of the run, for a run that knows it only when its data are loaded."""
        self._max_num_steps = max_num_steps

    def phase_started(self, name: str, process: str) -> None:
        """Show that a phase of the start-up has begun."""
        with self._lock:
            self._open_phases[name, process] = time.monotonic()

    def phase_ended(self, name: str, process: str, duration_s: float) -> None:
        """Show that a phase of the start-up has ended."""
        with self._lock:
            self._open_phases.pop((name, process), None)
            self._done_phases.append((name, duration_s))
        if self._live is None:
            self._print(f"start-up  {name}: {duration_s:.1f} s")

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step, of a validation, or of an evaluation in the background."""
        if any(name.startswith(_EVALUATION) for name in metrics):
            self._show_evaluation(step, metrics)
            return
        is_validation = any(name.startswith(_VALIDATION) for name in metrics)
        with self._lock:
            if is_validation:
                self._validation = (step, dict(metrics))
                self._best_accuracy = max(self._best_accuracy, metrics.get("val/accuracy", float("-inf")))
                self._best_loss = min(self._best_loss, metrics.get("val/loss", float("inf")))
            else:
                self._step, self._metrics = step, dict(metrics)
                for name, value in metrics.items():
                    self._history.setdefault(name, deque(maxlen=_HISTORY)).append(value)
            if self._clock is None:
                # The first step of this process starts now, after a validation, or started one step ago.
                started = time.monotonic() - (0.0 if is_validation else metrics.get("timing/step_s", 0.0))
                self._clock = (step if is_validation else step - 1, started)
        if self._live is None:
            self._print(self._validation_line(step, metrics) if is_validation else self._step_line(step, metrics))

    def _show_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._lock:
            self._evaluation = (step, dict(metrics))
        if self._live is None:
            self._print(f"evaluation of step {step}: {_headline(metrics, _EVALUATION)}")

    def _eta_s(self) -> float | None:
        if self._clock is None or not self._clock[0] < self._step < self._max_num_steps:
            return None
        first, started = self._clock
        return (time.monotonic() - started) / (self._step - first) * (self._max_num_steps - self._step)

    def _print(self, line: str) -> None:
        if self._is_closed:
            return
        try:
            self._console.print(line, soft_wrap=True, markup=False)
        except (OSError, SystemExit) as error:  # rich raises SystemExit if the reader of a pipe exited
            self._is_closed = True
            reason = error.strerror if isinstance(error, OSError) else "the reader closed the pipe"
            logger.warning(
                "the output cannot be written: %s; the run continues and writes its metrics to files", reason
            )
            with contextlib.suppress(OSError, ValueError):  # avoids another error when Python exits
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._console.file.fileno())

    def _step_line(self, step: int, metrics: Mapping[str, float]) -> str:
        parts = [f"step {step:>{len(str(self._max_num_steps))}}/{self._max_num_steps}"]
        for name, label, form in _rows(metrics):
            if name in metrics and name in (
                "train/reward",
                "train/loss",
                "train/completion_length",
                "train/kl_to_teacher",
                "train/kl",
                "perf/tokens_per_s",
            ):
                text = form.format(metrics[name])
                parts.append(text if name.startswith("perf/") else f"{label} {text.removesuffix(' tokens')}")
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in _phases(metrics)[:4])
        if "timing/step_s" in metrics:
            parts.append(f"{metrics['timing/step_s']:.2f} s" + (f" ({phases})" if phases else ""))
        eta = self._eta_s()
        return "  ".join([*parts, *([f"ETA {format_duration(eta)}"] if eta is not None else [])])

    def _validation_line(self, step: int, metrics: Mapping[str, float]) -> str:
        return f"validation at step {step}: {_headline(metrics, _VALIDATION)}  (best {self._best(metrics):.3f})"

    def _best(self, metrics: Mapping[str, float]) -> float:
        return self._best_accuracy if "val/accuracy" in metrics else self._best_loss

    def _render(self) -> RenderableType:
        with self._lock:
            parts: list[RenderableType] = []
            if self._metrics or self._validation:
                parts.append(self._progress())
            if self._metrics:
                parts += [Text(), self._tables()]
            if self._validation:
                parts += [Text(), self._validation_text()]
            if self._evaluation:
                step, metrics = self._evaluation
                values = _headline(metrics, _EVALUATION)
                parts += [Text(), Text.assemble(("evaluation ", "bold"), (f"of step {step}: ", "dim"), values)]
            if not self._metrics or self._open_phases:
                parts += [*([Text()] if parts else []), self._startup()]
            return Panel(Group(*parts), title=Text(self._title, "bold"), border_style="cyan", padding=(1, 2))

    def _progress(self) -> RenderableType:
        eta = self._eta_s()
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column()
        grid.add_column(ratio=1)
        grid.add_column()
        grid.add_row(
            f"[bold]step {self._step}[/] of {self._max_num_steps}",
            ProgressBar(total=self._max_num_steps, completed=self._step),
            f"ETA {format_duration(eta)}" if eta is not None else "",
        )
        return grid

    def _tables(self) -> RenderableType:
        metrics = Table.grid(padding=(0, 2))
        for name, label, form in _rows(self._metrics):
            if name in self._metrics:
                trend = sparkline(list(self._history[name])[-24:])
                metrics.add_row(f"[dim]{label}", form.format(self._metrics[name]), f"[cyan]{trend}")
        phases = Table.grid(padding=(0, 2))
        step_s = self._metrics.get("timing/step_s", 0.0)
        phases.add_row("[dim]step", f"{step_s:.2f} s", "")
        for name, seconds in _phases(self._metrics):
            bar = "█" * round(_PHASE_BAR * seconds / step_s) if step_s else ""
            phases.add_row(f"[dim]{name}", f"{seconds:.2f} s", f"[green]{bar}")
        grid = Table.grid(padding=(0, 4))
        grid.add_row(metrics, phases)
        return grid

    def _validation_text(self) -> RenderableType:
        assert self._validation is not None
        step, metrics = self._validation
        shown = _headline(metrics, _VALIDATION)
        text = Text.assemble(("validation ", "bold"), (f"at step {step}: ", "dim"), shown)
        return text.append(f"  (best {self._best(metrics):.3f})", "dim")

    def _startup(self) -> RenderableType:
        now = time.monotonic()
        rows: list[RenderableType] = []
        if not self._metrics and self._done_phases:
            done = "  ".join(f"{name} {seconds:.1f} s" for name, seconds in self._done_phases)
            rows.append(Text(f"done: {done}", "dim"))
        rows += [
            Spinner("dots", Text(f"{name} {now - started:.1f} s"), style="cyan")
            for (name, _), started in self._open_phases.items()
        ]
        return Group(*rows) if rows else Text("starting", "dim")

    def _move_log_handlers(self) -> None:
        """Let log handlers write to the `sys.stderr` that Live installs. The old stream would write into the panel."""
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.__stderr__, sys.__stdout__):
                self._moved_handlers.append((handler, handler.stream))
                handler.setStream(sys.stderr if handler.stream is sys.__stderr__ else sys.stdout)


def sparkline(values: list[float]) -> str:
    """Draw values as block characters, scaled from the minimum to the maximum.

    Example:
        >>> sparkline([0.0, 1.0, 7.0])
        '▁▂█'
    """
    if not values:
        return ""
    low, high = min(values), max(values)
    if high == low:
        return _SPARKS[0] * len(values)
    return "".join(_SPARKS[round((value - low) / (high - low) * (len(_SPARKS) - 1))] for value in values)


def format_duration(seconds: float) -> str:
    """Format a duration.

    Example:
        >>> [format_duration(seconds) for seconds in (42, 200, 7500)]
        ['42 s', '3m20s', '2h05m']
    """
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60}m{rounded % 60:02d}s"
    return f"{rounded // 3600}h{rounded % 3600 // 60:02d}m"


def _rows(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Return the rows of the panel. The loss of reinforcement learning says nothing about its progress."""
    return [row for row in _ROWS if row[0] != "train/loss" or "train/reward" not in metrics]


def _phases(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return the phases of a step with their seconds, longest first."""
    parts = [
        (name.removeprefix("timing/").removesuffix("_s"), seconds)
        for name, seconds in metrics.items()
        if name.startswith("timing/")
    ]
    return sorted(((n, s) for n, s in parts if n not in _TOTALS and "/" not in n), key=lambda part: -part[1])


def _headline(metrics: Mapping[str, float], prefix: str) -> str:
    """Return the most important metrics that begin with a prefix, such as "val/"."""
    values = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    shown = ("accuracy", "completion_length", "loss")
    return "  ".join(
        f"{name} {value:.3f}" for name, value in values.items() if name in shown or name.startswith(("pass@", "maj@"))
    )
