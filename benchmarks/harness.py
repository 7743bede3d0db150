"""What every benchmark shares: interleaved repetition, medians, ratios per round, one table and one JSON file.

::

    round 1:  A  B  C      A ratio is taken within a round (A1/B1, A2/B2, ...) and its median is quoted: what slows the
    round 2:  C  B  A      machine for a while slows both sides of a ratio. Every other round runs backwards, so that
    round 3:  A  B  C      nobody always comes after the same case and pays for what it left behind.

Absolute times hold for one machine on one day; ratios are what to compare.

A benchmark is a script in this directory::

    def main() -> None:
        arguments = harness.parser(__doc__).parse_args()
        cases = [Case("ours", ours), Case("rival", rival)]          # each returns {"seconds": 1.2, ...}
        results = harness.measure(cases, repeats=arguments.repeats)
        harness.report("my_benchmark", results, [Ratio("seconds", "ours", "rival", at_most=1.1)], arguments.json)

`report` prints whether a goal is met; it never fails: how fast a machine is, is no test.
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
# Set in many containers. Without bytecode every fresh process compiles what it imports, and that would be measured.
UNSET = ("PYTHONDONTWRITEBYTECODE",)

Metrics = Mapping[str, float]

_progress = Console(stderr=True)


@dataclass(frozen=True)
class Case:
    """One side of a comparison.

    Attributes:
        name: as the table shows it.
        run: does it once and returns what was measured; preparing and cleaning up within it are its own business.
    """

    name: str
    run: Callable[[], Metrics]


@dataclass(frozen=True)
class Ratio:
    """Compare `metric` of the case `of` with `rival_metric` (default: the same) of the case `to`, within each round."""

    metric: str
    of: str
    to: str
    at_most: float | None = None
    at_least: float | None = None
    rival_metric: str | None = None

    @property
    def goal(self) -> str:
        """The goal as text, empty without one."""
        if self.at_most is not None:
            return f"at most {self.at_most:g}x"
        return "" if self.at_least is None else f"at least {self.at_least:g}x"

    def met(self, value: float) -> bool | None:
        """Whether a value reaches the goal; None without one."""
        if self.at_most is not None:
            return value <= self.at_most
        return None if self.at_least is None else value >= self.at_least


@dataclass
class Measurements:
    """What every case gave in every round: `rounds[case][i][metric]`."""

    rounds: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def add(self, case: str, metrics: Metrics) -> None:
        """Append one round of a case."""
        self.rounds.setdefault(case, []).append(dict(metrics))

    def merge(self, other: Measurements) -> None:
        """Add the rounds of another group of cases, which were interleaved among themselves."""
        for case, rounds in other.rounds.items():
            self.rounds.setdefault(case, []).extend(rounds)

    def values(self, case: str, metric: str) -> list[float]:
        """One number per round."""
        return [round_[metric] for round_ in self.rounds[case]]

    def median(self, case: str, metric: str) -> float:
        """Median over the rounds."""
        return statistics.median(self.values(case, metric))

    def ratios(self, ratio: Ratio) -> list[float]:
        """One ratio per round."""
        rivals = self.values(ratio.to, ratio.rival_metric or ratio.metric)
        return [own / rival for own, rival in zip(self.values(ratio.of, ratio.metric), rivals, strict=True)]

    def rows(self) -> Iterator[tuple[str, str, list[float]]]:
        """(case, metric, values) in the order in which they were first seen."""
        for case, rounds in self.rounds.items():
            for metric in rounds[0]:
                yield case, metric, self.values(case, metric)


def parser(description: str | None, repeats: int = 3) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; parsing happens after `prepare_environment`."""
    prepare_environment()
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=_positive, default=repeats, help=f"rounds (default: {repeats})")
    made.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/<name>.json")
    return made


def prepare_environment() -> None:
    """Unset what would make every process slow, here and in all children; the report says that it was unset."""
    for name in UNSET:
        if os.environ.pop(name, None) is not None:
            _unset.append(name)
    sys.dont_write_bytecode = False
    # So that scratch directories and clusters are cleaned up also when a time limit ends a benchmark.
    signal.signal(signal.SIGTERM, _stop)


def _stop(signal_number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice; the second must not end the cleaning up
    sys.exit(128 + signal_number)


def run(command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a child to its end and return its standard output.

    The child is asked to end, and waited for, when the benchmark is ended: a killed job would leave its workers behind.
    When it fails, the benchmark ends with the last lines that it wrote.
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
            told = (written + errors.read())[-4000:]
            raise SystemExit(f"{' '.join(command)[:300]} ended with {child.returncode}:\n{told}")
    return written


def run_json(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a child as `run` does; the JSON object on the last line of what it wrote."""
    answer: dict[str, Any] = json.loads(run(command, env=env).splitlines()[-1])
    return answer


_unset: list[str] = []


def measure(cases: Sequence[Case], repeats: int, warmups: int = 0) -> Measurements:
    """Run all cases in turn, `repeats` times over, every other time backwards, after `warmups` uncounted rounds."""
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
    """Print tables on standard output and write `benchmarks/results/<name>.json` (or `path`); returns what it wrote.

    Args:
        notes: sentences that a reader needs to judge the numbers.
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
    """What the numbers depend on: processor, memory, versions, and the load that others put on it."""
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
    """Path of uv, if there is one. Not through a version manager's shim: starting that would be measured with it."""
    for directory in (Path(sys.executable).parent, Path(sys.base_prefix) / "bin"):
        if (directory / "uv").exists():
            return str(directory / "uv")
    return shutil.which("uv")


def uv() -> str:
    """Path of uv; ends the benchmark where there is none."""
    found = find_uv()
    if found is None:
        raise SystemExit("uv is not installed: pip install uv")
    return found


def uv_version() -> str:
    """Version of uv."""
    return subprocess.run([uv(), "--version"], capture_output=True, text=True, check=True).stdout.split()[1]


def timed(function: Callable[[], object]) -> float:
    """Seconds that one call takes."""
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
        "rival_metric": ratio.rival_metric or ratio.metric,
        "per_round": values,
        "median": value,
        "goal": ratio.goal,
        "met": ratio.met(value),
    }


def _ratio_table(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("ratio, per round", "metric", title="against the rival", title_justify="left")
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
