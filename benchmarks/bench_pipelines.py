"""Three versions of one library in one pipeline, and many small tasks: our executors against plain Ray.

    uv run benchmarks/bench_pipelines.py
    uv run benchmarks/bench_pipelines.py --cases "actor pool" "ray pip" --repeats 1

Every case has a process and a Ray session of its own. `first` is a pipeline whose stages see `packaging` of the base,
23.2 and 24.0, with no venvs yet; `second` is the same again in the same session; `after restart` the same in a new
session, with what the first one left on disk. `2000 tasks` is three stages over 2,000 small tasks, start of the workers
included.

| case | what it is |
| --- | --- |
| actor pool, ray data | our executors; lists by pip and by uv |
| ray pip, ray uv | actors with Ray's own `runtime_env`, one per version, called one after another |
| plain ray data | `map_batches` with actors on the same 2,000 rows |
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
from harness import Case, Metrics, Ratio

CASES = ("actor pool", "ray data", "ray pip", "ray uv", "plain ray data")
SESSION = Path(__file__).with_name("pipelines_session.py")


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    arguments = parser.parse_args()
    cases = [Case(name, lambda name=name: run(name)) for name in arguments.cases]
    results = harness.measure(cases, repeats=arguments.repeats)
    ours = [name for name in ("actor pool", "ray data") if name in arguments.cases]
    ratios = [
        Ratio(metric, name, rival, at_most=0.2 if metric == "first" and rival == "ray pip" else None)
        for name in ours
        for metric in ("first", "second", "after restart")
        for rival in ("ray pip", "ray uv")
        if rival in arguments.cases
    ]
    ratios += [Ratio("after restart", name, name, at_most=1.5, rival_metric="second") for name in ours]
    ratios += [Ratio("2000 tasks", name, "plain ray data") for name in ours if "plain ray data" in arguments.cases]
    harness.report("pipelines", results, ratios, arguments.json, title="seconds")


def run(name: str) -> Metrics:
    """One case: a first session, and a second one that finds what the first left on disk."""
    with tempfile.TemporaryDirectory(prefix="bench-pipelines-") as scratch:
        environment = {**os.environ, "NEMO_RL_VENV_DIR": str(Path(scratch, "venvs")), "RAY_ADDRESS": "local"}
        first = session(name, "first", environment)
        if name == "plain ray data":
            return first
        again = session(name, "again", environment)
    return {**first, "after restart": again["first"]}


def session(name: str, part: str, environment: dict[str, str]) -> dict[str, float]:
    """What one Ray session measured."""
    command = [sys.executable, str(SESSION), name, part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


if __name__ == "__main__":
    main()
