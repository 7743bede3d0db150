"""Three versions of one library in one pipeline, and many small tasks: our executors against plain Ray.

    uv run benchmarks/bench_pipelines.py
    uv run benchmarks/bench_pipelines.py --cases "actor pool" "ray pip" --repeats 1

Every case has a process and a Ray session of its own. `first` is a pipeline whose stages see `packaging` of the base,
23.2 and 24.0, with no venvs yet; `second` is the same again in the same session; `after restart` the same in a new
session, with what the first one left on disk. `MB per venv` is what each of the two extra versions takes on disk.
`2000 tasks` is three stages over 2,000 small tasks, start of the workers included. `GB/h` is how fast the curation of
math problems (`examples/run_curate_math.py`) takes raw input, all its stages together, on so many cores.

| case | what it is |
| --- | --- |
| actor pool, ray data, xenna | our executors; lists by pip and by uv. Xenna where the extra `xenna` is installed |
| ray pip, ray uv | actors with Ray's own `runtime_env`, one per version, called one after another |
| plain ray data | `map_batches` with actors on the same 2,000 rows |
| curation, 1 core; curation, 2 cores | the job on a messy sample of `--lines`, pinned to cores |
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
CASES = (*OURS, "ray pip", "ray uv", "plain ray data", *CURATION)
SESSION = Path(__file__).with_name("pipelines_session.py")


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--lines", type=int, default=20_000, help="raw problems of the curation (default: 20000)")
    arguments = parser.parse_args()
    notes = [f"the curation reads {arguments.lines:,} lines"] if set(CURATION) & set(arguments.cases) else []
    if "xenna" in arguments.cases and importlib.util.find_spec("cosmos_xenna") is None:
        arguments.cases = [name for name in arguments.cases if name != "xenna"]
        notes.append("xenna is skipped: cosmos-xenna is not installed here (`uv sync --extra xenna`)")
        if not arguments.cases:
            parser.exit(message=f"{notes[-1]}\n")
    with tempfile.TemporaryDirectory(prefix="bench-pipelines-") as scratch:
        rival_python = python_with_pip(Path(scratch)) if "ray pip" in arguments.cases else sys.executable
        cases = [
            Case(name, functools.partial(run, name, arguments.lines, rival_python if name == "ray pip" else None))
            for name in arguments.cases
        ]
        results = harness.measure(cases, repeats=arguments.repeats)
    ours = [name for name in OURS if name in arguments.cases]
    rivals = [name for name in ("ray pip", "ray uv") if name in arguments.cases]
    ratios = [
        Ratio(metric, name, rival, at_most=0.2 if metric == "first" and rival == "ray pip" else None)
        for name in ours
        for metric in ("first", "second", "after restart")
        for rival in rivals
    ]
    ratios += [Ratio("after restart", name, name, at_most=1.5, rival_metric="second") for name in ours]
    ratios += [Ratio("MB per venv", name, rival) for name in ours for rival in rivals]
    ratios += [Ratio("2000 tasks", name, "plain ray data") for name in ours if "plain ray data" in arguments.cases]
    if set(CURATION) <= set(arguments.cases):
        ratios.append(Ratio("GB/h", "curation, 2 cores", "curation, 1 core"))
    harness.report("pipelines", results, ratios, arguments.json, title="seconds, where not said", notes=notes)


def python_with_pip(scratch: Path) -> str:
    """The interpreter of a venv like this project's that has pip as well: Ray's `pip` copies it and needs that."""
    environment = {**os.environ, "UV_PROJECT_ENVIRONMENT": str(scratch / "venv")}
    python = str(scratch / "venv" / "bin" / "python")
    harness.run(["uv", "sync", "--locked", "--quiet", "--group", "dev"], env=environment, cwd=harness.REPOSITORY)
    harness.run(["uv", "pip", "install", "--quiet", "--python", python, "pip"], env=environment)
    return python


def run(name: str, num_lines: int, python: str | None) -> Metrics:
    """One case: a first session, and a second one that finds what the first left on disk."""
    with tempfile.TemporaryDirectory(prefix="bench-pipelines-") as scratch:
        environment = {**os.environ, "NEMO_RL_VENV_DIR": str(Path(scratch, "venvs")), "RAY_ADDRESS": "local"}
        if name in CURATION:
            return session("curation", f"{CURATION[name]}/{num_lines}", environment, python)
        first = session(name, "first", environment, python)
        if name == "plain ray data":
            return first
        again = session(name, "again", environment, python)
    return {**first, "after restart": again["first"]}


def session(name: str, part: str, environment: dict[str, str], python: str | None) -> dict[str, float]:
    """What one Ray session measured; in this process's Python unless another is given."""
    command = [python or sys.executable, str(SESSION), name, part]
    written = harness.run(command, env=environment)
    return json.loads(next(line for line in reversed(written.splitlines()) if line.startswith("{")))


if __name__ == "__main__":
    main()
