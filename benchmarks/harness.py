"""Runs benchmarks: interleaved rounds, medians, ratios per round, tables and a JSON file.

::

    round 1:  A  B  C      A ratio is taken within a round (A1/B1, A2/B2, ...), and the median ratio is reported. If the
    round 2:  C  B  A      machine is slow for a while, both sides of a ratio are slow. Every other round runs in
    round 3:  A  B  C      reverse, so that no case always runs after the same other case.

Absolute times are valid for one machine on one day. Compare ratios instead.

A benchmark is a script in this directory::

    def main() -> None:
        arguments = harness.parser(__doc__).parse_args()
        cases = [Case("ours", ours), Case("baseline", baseline)]          # each returns {"seconds": 1.2, ...}
        results = harness.measure(cases, repeats=arguments.repeats)
        harness.report("my_benchmark", results, [Ratio("seconds", "ours", "baseline", at_most=1.1)], arguments.json)

`report` prints whether a goal is met, but never fails: the speed of a machine is not a test.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("ray", "torch", "transformers", "numpy")
# Set in many containers. Without bytecode, every new process compiles its imports, and the times would include that.
UNSET = ("PYTHONDONTWRITEBYTECODE",)

Metrics = Mapping[str, float]

_progress = Console(stderr=True)


@dataclass(frozen=True)
class Case:
    """Describes one side of a comparison.

    Attributes:
        name: name in the table.
        run: runs the case once and returns the measured metrics. It prepares and cleans up by itself.
    """

    name: str
    run: Callable[[], Metrics]


@dataclass(frozen=True)
class Ratio:
    """Compares `metric` of case `of` with `baseline_metric` (default: the same) of case `to`, within each round."""

    metric: str
    of: str
    to: str
    at_most: float | None = None
    at_least: float | None = None
    baseline_metric: str | None = None

    @property
    def goal(self) -> str:
        """The goal as text; empty if there is no goal."""
        if self.at_most is not None:
            return f"at most {self.at_most:g}x"
        return "" if self.at_least is None else f"at least {self.at_least:g}x"

    def met(self, value: float) -> bool | None:
        """Return whether a value meets the goal, or None if there is no goal."""
        if self.at_most is not None:
            return value <= self.at_most
        return None if self.at_least is None else value >= self.at_least


@dataclass
class Measurements:
    """Holds the metrics of all cases and rounds: `rounds[case][i][metric]`."""

    rounds: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def add(self, case: str, metrics: Metrics) -> None:
        """Append one round of a case."""
        self.rounds.setdefault(case, []).append(dict(metrics))

    def merge(self, other: Measurements) -> None:
        """Add the rounds of another group of cases, which were interleaved separately."""
        for case, rounds in other.rounds.items():
            self.rounds.setdefault(case, []).extend(rounds)

    def values(self, case: str, metric: str) -> list[float]:
        """Return one value per round."""
        return [round_[metric] for round_ in self.rounds[case]]

    def median(self, case: str, metric: str) -> float:
        """Return the median over the rounds."""
        return statistics.median(self.values(case, metric))

    def ratios(self, ratio: Ratio) -> list[float]:
        """Return one ratio per round."""
        values = self.values(ratio.of, ratio.metric)
        baselines = self.values(ratio.to, ratio.baseline_metric or ratio.metric)
        return [value / baseline for value, baseline in zip(values, baselines, strict=True)]

    def rows(self) -> Iterator[tuple[str, str, list[float]]]:
        """Yield (case, metric, values) in the order of the first round."""
        for case, rounds in self.rounds.items():
            for metric in rounds[0]:
                yield case, metric, self.values(case, metric)


def parser(description: str | None, repeats: int = 3) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share. Calls `prepare_environment` first."""
    prepare_environment()
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--repeats", type=_positive, default=repeats, help=f"rounds (default: {repeats})")
    result.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/<name>.json")
    return result


def prepare_environment() -> None:
    """Unset variables that slow down every process, here and in all children. The report lists them."""
    for name in UNSET:
        if os.environ.pop(name, None) is not None:
            _unset.append(name)
    sys.dont_write_bytecode = False
    # Cleans up scratch directories and clusters if a time limit ends the benchmark.
    signal.signal(signal.SIGTERM, _stop)


def _stop(signal_number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice; do not interrupt the cleanup
    sys.exit(128 + signal_number)


def run(command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a child process and return its standard output.

    If the benchmark is interrupted, the child is terminated gracefully, because a killed job would leave its workers
    behind. If the child fails, the benchmark exits with the last lines of the child's output.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            written, _ = child.communicate()
        except BaseException:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=30)
            child.kill()
            raise
        if child.returncode:
            errors.seek(0)
            output = (written + errors.read())[-4000:]
            raise SystemExit(f"{' '.join(command)[:300]} failed with exit status {child.returncode}:\n{output}")
    return written


def run_json(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a child as `run` does, and return the JSON object on the last line of its output."""
    answer: dict[str, Any] = json.loads(run(command, env=env).splitlines()[-1])
    return answer


_unset: list[str] = []


def measure(cases: Sequence[Case], repeats: int, warmups: int = 0) -> Measurements:
    """Run all cases for `repeats` rounds, every other round backwards, after `warmups` uncounted rounds."""
    results = Measurements({case.name: [] for case in cases})
    for index in range(-warmups, repeats):
        for case in cases if index % 2 == 0 else reversed(cases):
            where = f"round {index + 1}/{repeats}" if index >= 0 else "warm-up"
            started = time.perf_counter()
            metrics = case.run()
            shown = ", ".join(f"{name}={value:.4g}" for name, value in metrics.items())
            _progress.print(f"[dim]{where}[/] {case.name}: {shown} [dim]({time.perf_counter() - started:.1f} s)[/]")
            if index >= 0:
                results.add(case.name, metrics)
    return results


def report(
    name: str,
    results: Measurements,
    ratios: Sequence[Ratio] = (),
    path: Path | None = None,
    *,
    title: str | None = None,
    notes: Sequence[str] = (),
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Print tables and write `benchmarks/results/<name>.json`. Returns the content of the file.

    Args:
        name: name of the benchmark.
        results: the measurements.
        ratios: the ratios to report.
        path: another file to write.
        title: title of the table.
        notes: sentences that explain the numbers.
        details: further JSON data, such as settings.
    """
    where = machine()
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_measurement_table(title or name, results))
    comparisons = [_comparison(results, ratio) for ratio in ratios]
    if comparisons:
        console.print(_ratio_table(comparisons))
    for note in notes:
        console.print(f"- {note}", markup=False)
    console.print("machine: " + ", ".join(f"{key} {value}" for key, value in where.items()), markup=False)
    medians: dict[str, dict[str, float]] = {case: {} for case in results.rounds}
    for case, metric, values in results.rows():
        medians[case][metric] = statistics.median(values)
    document: dict[str, Any] = {
        "benchmark": name,
        "finished_at": time.strftime("%FT%T%z"),
        "commit": _commit(),
        "machine": where,
        "notes": list(notes),
        "details": dict(details or {}),
        "rounds": results.rounds,
        "medians": medians,
        "ratios": comparisons,
    }
    target = path or RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _progress.print(f"[dim]written: {target}[/]")
    return document


def machine() -> dict[str, Any]:
    """Return the facts on which the numbers depend: processor, memory, versions and load."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "linux": platform.release(),
        "python": platform.python_version(),
        "uv": uv_version() if find_uv() else "none",
        **{package: _version(package) for package in PACKAGES},
        "load_1min": round(os.getloadavg()[0], 1),
        "unset": " ".join(_unset) or "nothing",
    }


def find_uv() -> str | None:
    """Return the path of uv, if it is installed. Avoids a version manager's shim, whose start would be measured."""
    for directory in (Path(sys.executable).parent, Path(sys.base_prefix) / "bin"):
        if (directory / "uv").exists():
            return str(directory / "uv")
    return shutil.which("uv")


def uv() -> str:
    """Return the path of uv. Exits if uv is not installed."""
    path = find_uv()
    if path is None:
        raise SystemExit("uv is not installed: pip install uv")
    return path


def uv_version() -> str:
    """Return the version of uv."""
    return subprocess.run([uv(), "--version"], capture_output=True, text=True, check=True).stdout.split()[1]


def timed(function: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _measurement_table(title: str, results: Measurements) -> Table:
    table = Table("case", "metric", title=title, title_justify="left")
    for column in ("median", "min", "max", "n"):
        table.add_column(column, justify="right")
    previous = None
    for case, metric, values in results.rows():
        shown = "" if case == previous else case
        previous = case
        numbers = (statistics.median(values), min(values), max(values))
        table.add_row(shown, metric, *(f"{number:,.4g}" for number in numbers), str(len(values)))
    return table


def _comparison(results: Measurements, ratio: Ratio) -> dict[str, Any]:
    values = results.ratios(ratio)
    value = statistics.median(values)
    return {
        "of": ratio.of,
        "to": ratio.to,
        "metric": ratio.metric,
        "baseline_metric": ratio.baseline_metric or ratio.metric,
        "per_round": values,
        "median": value,
        "goal": ratio.goal,
        "met": ratio.met(value),
    }


def _ratio_table(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("ratio, per round", "metric", title="against the baseline", title_justify="left")
    for column in ("median", "min", "max"):
        table.add_column(column, justify="right")
    table.add_column("goal")
    words = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}
    for row in comparisons:
        numbers = (row["median"], min(row["per_round"]), max(row["per_round"]))
        goal = f"{row['goal']} {words[row['met']]}".strip()
        table.add_row(f"{row['of']} / {row['to']}", row["metric"], *(f"{n:.3g}x" for n in numbers), goal)
    return table


def _cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("expected a positive number")
    return value


@contextlib.contextmanager
def watched_lines(path: Path) -> Iterator[list[float]]:
    """Yield a list of the times at which lines appear in a file, within 10 ms. The file need not exist yet."""
    arrivals: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        position = 0
        while True:
            last = ended.is_set()
            if path.exists() and path.stat().st_size > position:
                with path.open("rb") as file:
                    file.seek(position)
                    new = file.read()
                position += len(new)
                arrivals.extend([time.perf_counter()] * new.count(b"\n"))
            if last:
                return
            ended.wait(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield arrivals
    finally:
        ended.set()
        thread.join()
