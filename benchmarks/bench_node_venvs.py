"""Measures providing venvs on every node of a cluster: many nodes on one file system against one node.

    uv run benchmarks/bench_node_venvs.py                  # 1 and 8 simulated nodes
    uv run benchmarks/bench_node_venvs.py --no-64          # skip the check of 64 nodes (63 Ray processes, 4 GB)

| column | meaning |
| --- | --- |
| Ray's processes | Ray starts its first process on every node except the driver's; not included in the other columns |
| first | the first venv of a job: 60 packages with bytecode, all in uv's cache, none in the store |
| second | another venv of the same job: the same packages and one more |
| warm | the first call, repeated |
| warm, next job | a new driver on the same cluster: every node is queried once, and Ray starts a process for it |
| 64 x 4 asked | 64 nodes with 4 ready venvs each: the cost of a job's first check |
| 64 x 4 known | the same call again in the same job: the cost of every further worker group |

Nodes are simulated (`ray.cluster_utils.Cluster`) and share this machine's cores, unlike real nodes. For 64 nodes, the
driver's code runs against 8 simulated nodes that each answer for 8 nodes. Ray starts a process for each answer on this
machine, so only the driver's CPU time is the same as with 64 real nodes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
from harness import Case, Metrics, Ratio

PACKAGES = ("ray[default]==2.60.0", "numpy", "pandas", "pyarrow")
SESSION = Path(__file__).with_name("node_venvs_session.py")


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--nodes", type=int, default=8, help="number of nodes to compare with one node (default: 8)")
    parser.add_argument("--no-64", action="store_true", help="skip the check of 64 nodes")
    arguments = parser.parse_args()
    cache = Path(
        subprocess.run([harness.uv(), "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
    )
    with tempfile.TemporaryDirectory(prefix="bench-node-venvs-", dir=cache.parent) as scratch:
        project = _project(Path(scratch) / "project")
        many = f"{arguments.nodes} nodes"
        cases = [
            Case("1 node", lambda: _session(1, project, Path(scratch) / "venvs")),
            Case(many, lambda: _session(arguments.nodes, project, Path(scratch) / "venvs", not arguments.no_64)),
        ]
        results = harness.measure(cases, arguments.repeats)
    ratios = [Ratio("first", many, "1 node", at_most=1.2), Ratio("second", many, "1 node", at_most=1.2)]
    notes = [
        "All simulated nodes share this machine's cores; real nodes have separate cores.",
        "64 x 4 asked: 8 simulated nodes answer for 8 nodes each. Most of the time is spent on starting 63 processes. "
        "The goal is under one second of the driver's time.",
    ]
    harness.report("bench_node_venvs", results, ratios, arguments.json, title="Venvs on every node", notes=notes)


def _session(num_nodes: int, project: Path, store: Path, check_64: bool = False) -> Metrics:
    shutil.rmtree(store, ignore_errors=True)
    environment = os.environ | {"NEMO_RL_VENV_DIR": str(store), "PYTHONPATH": str(harness.REPOSITORY)}
    for name in ("RAY_ADDRESS", "NRL_FORCE_REBUILD_VENVS"):
        environment.pop(name, None)
    command = [sys.executable, str(SESSION), str(num_nodes), str(project), *(["--check-64"] if check_64 else [])]
    return harness.run_json(command, env=environment)


def _project(root: Path) -> Path:
    root.mkdir()
    dependencies = ", ".join(f'"{package}"' for package in PACKAGES)
    (root / "pyproject.toml").write_text(
        f'[project]\nname = "bench"\nversion = "0"\nrequires-python = ">=3.11"\ndependencies = [{dependencies}]\n'
        '[project.optional-dependencies]\nsecond = ["iniconfig"]\n[tool.uv]\npackage = false\n'
    )
    subprocess.run([harness.uv(), "lock", "--quiet", "--python", sys.executable], cwd=root, check=True)
    # Download everything into uv's cache, and delete the venv.
    for extra in ([], ["--extra", "second"]):
        sync = [harness.uv(), "sync", "--locked", "--quiet", "--python", sys.executable, *extra]
        subprocess.run(sync, cwd=root, check=True, env=os.environ | {"UV_PROJECT_ENVIRONMENT": str(root / "warm")})
    shutil.rmtree(root / "warm")
    return root


if __name__ == "__main__":
    main()
