"""Compares our pipeline executors with NeMo Curator and plain Ray: three versions of one library, many small tasks.

    uv run benchmarks/bench_pipelines.py
    uv run benchmarks/bench_pipelines.py --cases "actor pool" "ray pip" --repeats 1

Every case runs in a separate process and Ray session.

| metric | meaning |
| --- | --- |
| first | a pipeline whose stages use `packaging` of the base, 23.2 and 24.0; no venv exists yet |
| second | the same pipeline again in the same session |
| after restart | the same pipeline in a new session, with the files of the first session on disk |
| MB per venv | disk space of each of the two extra versions |
| 2000 tasks | three stages over 2,000 small tasks, including the start of the workers |
| GB/h | rate at which the curation of math problems (`examples/run_curate_math.py`) processes raw input |

| case | what runs |
| --- | --- |
| actor pool, ray data, xenna | our executors, with `pip` and `uv` lists. Xenna only if the extra `xenna` is installed |
| ray pip, ray uv | actors with Ray's own `runtime_env`, one per version, called one after another |
| plain ray data | `map_batches` with actors on the same 2,000 rows |
| curator actor pool, curator ray data, curator xenna | NeMo Curator's executors, with `pip` and `uv` lists (20 GB) |
| curation, 1 core; curation, 2 cores | the job on a messy sample of `--lines` lines, pinned to the cores |
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import harness
from harness import Case, Metrics, Ratio

CURATION = {"curation, 1 core": 1, "curation, 2 cores": 2}
OURS = ("actor pool", "ray data", "xenna")
CURATOR = {f"curator {name}": name for name in OURS}
CASES = (*OURS, *CURATOR, "ray pip", "ray uv", "plain ray data", *CURATION)
SESSION = Path(__file__).with_name("pipelines_session.py")
CURATOR_SESSION = Path(__file__).with_name("baselines") / "curator_pipelines.py"
RIVAL_METRICS = ("first", "second", "MB per venv", "2000 tasks")
CURATOR_PACKAGE = "nemo-curator==1.4.0"


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--lines", type=int, default=20_000, help="raw problems for the curation (default: 20000)")
    arguments = parser.parse_args()
    notes = [f"the curation job reads {arguments.lines:,} lines"] if set(CURATION) & set(arguments.cases) else []
    if "xenna" in arguments.cases and importlib.util.find_spec("cosmos_xenna") is None:
        arguments.cases = [name for name in arguments.cases if name != "xenna"]
        notes.append("xenna is skipped: cosmos-xenna is not installed here (`uv sync --extra xenna`)")
        if not arguments.cases:
            parser.exit(message=f"{notes[-1]}\n")
    with tempfile.TemporaryDirectory(prefix="bench-pipelines-") as scratch:
        pythons: dict[str, str] = {}
        if "ray pip" in arguments.cases:
            pythons["ray pip"] = python_with_pip(Path(scratch))
        if wanted := [name for name in CURATOR if name in arguments.cases]:
            pythons |= dict.fromkeys(wanted, python_with_curator(Path(scratch)))
        cases = [
            Case(name, functools.partial(run, name, arguments.lines, pythons.get(name))) for name in arguments.cases
        ]
        results = harness.measure(cases, repeats=arguments.repeats)
    ours = [name for name in OURS if name in arguments.cases]
    baselines = [name for name in ("ray pip", "ray uv") if name in arguments.cases]
    ratios = [
        Ratio(metric, name, baseline, at_most=0.2 if metric == "first" and baseline == "ray pip" else None)
        for name in ours
        for metric in ("first", "second", "after restart")
        for baseline in baselines
    ]
    ratios += [Ratio("after restart", name, name, at_most=1.1, baseline_metric="first") for name in ours]
    ratios += [Ratio("MB per venv", name, baseline) for name in ours for baseline in baselines]
    ratios += [Ratio("2000 tasks", name, "plain ray data") for name in ours if "plain ray data" in arguments.cases]
    for rival in [name for name in CURATOR if name in arguments.cases]:
        if CURATOR[rival] in ours:
            ratios += [Ratio(metric, CURATOR[rival], rival, at_most=0.2) for metric in RIVAL_METRICS]
    if {"actor pool", "ray data"} <= set(ours):
        ratios += [Ratio(metric, "ray data", "actor pool", at_most=1.5) for metric in ("first", "second", "2000 tasks")]
    if set(CURATION) <= set(arguments.cases):
        ratios.append(Ratio("GB/h", "curation, 2 cores", "curation, 1 core"))
    harness.report("pipelines", results, ratios, arguments.json, title="seconds, unless noted", notes=notes)


def python_with_pip(scratch: Path) -> str:
    """Create a venv like this project's, with pip, and return its interpreter. Ray's `pip` copies it and needs pip."""
    environment = {**os.environ, "UV_PROJECT_ENVIRONMENT": str(scratch / "venv")}
    python = str(scratch / "venv" / "bin" / "python")
    harness.run(["uv", "sync", "--locked", "--quiet", "--group", "dev"], env=environment, cwd=harness.REPOSITORY)
    harness.run(["uv", "pip", "install", "--quiet", "--python", python, "pip"], env=environment)
    return python


def python_with_curator(scratch: Path) -> str:
    """Create a venv with NeMo Curator, and pip for Ray's `pip`, and return its interpreter."""
    python = str(scratch / "curator" / "bin" / "python")
    harness.run([harness.uv(), "venv", "--quiet", "--python", sys.executable, str(scratch / "curator")])
    harness.run([harness.uv(), "pip", "install", "--quiet", "--python", python, CURATOR_PACKAGE, "pip"])
    return python


def run(name: str, num_lines: int, python: str | None) -> Metrics:
    """Run one case: a session, and a second session with the files of the first one on disk."""
    with tempfile.TemporaryDirectory(prefix="bench-pipelines-") as scratch:
        environment = {**os.environ, "NEMO_RL_VENV_DIR": str(Path(scratch, "venvs")), "RAY_ADDRESS": "local"}
        if name in CURATION:
            return session("curation", f"{CURATION[name]}/{num_lines}", environment, python)
        if name in CURATOR:
            return session(CURATOR[name], "first", environment, python, script=CURATOR_SESSION)
        first = session(name, "first", environment, python)
        if name == "plain ray data":
            return first
        again = session(name, "again", environment, python)
    return {**first, "after restart": again["first"]}


def session(
    name: str, part: str, environment: dict[str, str], python: str | None, *, script: Path = SESSION
) -> dict[str, float]:
    """Run one Ray session and return its metrics. Uses this process's Python by default."""
    command = [python or sys.executable, str(script), name, part]
    written = harness.run(command, env=environment)
    return json.loads(next(line for line in reversed(written.splitlines()) if line.startswith("{")))


if __name__ == "__main__":
    main()
