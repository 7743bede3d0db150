"""Measures the broadcast of one venv of known size to 1, 2, 4 and 8 hosts, and the traffic of the package index.

    sudo env PATH=$PATH python benchmarks/bench_broadcast.py       # needs root: the hosts are namespaces
    python benchmarks/broadcast_model.py                           # 64 to 4,096 nodes, from the rates measured here

Each host has its own address, link, disk, uv cache and raylet (`broadcast_hosts.py`). The package index runs on the
host of Ray's head, and sends at a limited rate, like an index behind a company's uplink. Nothing else is limited. "off"
runs with `NEMO_RL_VENV_SPREAD=off`: every host downloads from the index.

| metric | meaning |
| --- | --- |
| seconds | one call of `ensure_venvs_on_each_node`, with empty stores and caches |
| build_s | the part of `seconds` for the build (of one host, if every host builds) |
| receive_s | from the first request for a chunk until the last file is written, on the slowest host |
| cpu_s | CPU seconds of all processes of a receiving host in that time, including its raylet (mean) |
| registry_mb | traffic sent by the package index |
| head_mb | traffic from the head's host to other hosts, including Ray's own traffic and the index's answers to them |
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
from broadcast_hosts import Hosts, on_network_of_host_0
from harness import Case, Metrics, Ratio

HERE = Path(__file__).parent
NUM_WHEELS = 8
MB = 10**6
PORT = 8199


def main() -> None:
    parser = harness.parser(__doc__, repeats=1)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of hosts")
    parser.add_argument("--off", type=int, nargs="*", default=[4], help="numbers of hosts without a broadcast")
    parser.add_argument("--venv-mb", type=int, default=240, help="size of the venv (default: 240)")
    parser.add_argument("--registry-mb-s", type=float, default=20.0, help="rate of the package index (default: 20)")
    parser.add_argument("--scratch", default="/tmp", help="directory of the hosts' disks; a short path (default: /tmp)")
    arguments = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise SystemExit("bench_broadcast needs root and iproute2: its hosts are network namespaces")
    with tempfile.TemporaryDirectory(prefix="sp-", dir=arguments.scratch) as scratch:  # Ray's sockets need a short path
        packages = Path(scratch) / "packages"
        _make_packages(packages, arguments.venv_mb * MB // NUM_WHEELS)

        def case(count: int, mode: str) -> Metrics:
            return _session(count, mode, Path(scratch), packages, arguments.registry_mb_s * MB)

        cases = [Case(_name(count), lambda count=count: case(count, "auto")) for count in arguments.nodes]
        cases += [Case(f"{_name(count)}, off", lambda count=count: case(count, "off")) for count in arguments.off]
        results = harness.measure(cases, arguments.repeats)
    first, last = _name(arguments.nodes[0]), _name(arguments.nodes[-1])
    ratios = [Ratio("registry_mb", last, first, at_most=1.0), Ratio("seconds", last, first, at_most=1.5)]
    notes = [
        f"{arguments.venv_mb} MB in {NUM_WHEELS} wheels that compress to half their size.",
        f"The package index sends {arguments.registry_mb_s:g} MB/s.",
        "All hosts share this machine's cores, for unpacking, hashing and Ray's processes.",
    ]
    harness.report("broadcast", results, ratios, arguments.json, title="Broadcast of a venv to hosts", notes=notes)


def _name(count: int) -> str:
    return f"{count} host{'s' * (count > 1)}"


def _session(count: int, mode: str, scratch: Path, packages: Path, rate: float) -> Metrics:
    with tempfile.TemporaryDirectory(prefix="s", dir=scratch) as folder:
        environment = os.environ | {"PYTHONPATH": str(harness.REPOSITORY), "NEMO_RL_VENV_SPREAD": mode}
        for name in ("RAY_ADDRESS", "NRL_FORCE_REBUILD_VENVS", "UV_OFFLINE", "UV_INDEX_URL", "UV_DEFAULT_INDEX"):
            environment.pop(name, None)
        counted = Path(folder) / "registry_bytes"
        with Hosts(count, Path(folder), Path(sys.executable), environment) as hosts:
            address = hosts.address(0)
            registry = [sys.executable, str(HERE / "broadcast_registry.py"), str(packages), address, str(PORT)]
            with on_network_of_host_0(hosts, [*registry, str(rate), str(counted)]):
                time.sleep(1.0)
                project = _project(hosts, Path(folder) / "project", f"http://{address}:{PORT}/")
                before, sent_before = _count(counted), hosts.sent_bytes(0)
                command = [sys.executable, str(HERE / "broadcast_session.py"), str(project), *hosts.accounting()]
                output = harness.run(hosts.on_head(command), env=hosts.driver_environment())
                metrics = json.loads(output.splitlines()[-1])
                metrics["registry_mb"] = round((_count(counted) - before) / MB, 1)
                metrics["head_mb"] = round((hosts.sent_bytes(0) - sent_before) / MB, 1)
    return metrics


def _count(path: Path) -> int:
    return int(path.read_text() or 0) if path.exists() else 0


def _project(hosts: Hosts, root: Path, url: str) -> Path:
    root.mkdir()
    dependencies = ", ".join(f'"bulk{i}==1.0"' for i in range(NUM_WHEELS))
    (root / "pyproject.toml").write_text(
        f'[project]\nname = "bench"\nversion = "0"\nrequires-python = ">=3.11"\ndependencies = [{dependencies}]\n'
        f'[tool.uv]\npackage = false\n[[tool.uv.index]]\nurl = "{url}"\ndefault = true\n'
    )
    lock = [harness.uv(), "lock", "--quiet", "--no-cache", "--python", sys.executable]
    subprocess.run(hosts.on_head(["sh", "-c", f'cd {root} && exec "$@"', "sh", *lock]), check=True)
    return root


def _make_packages(folder: Path, num_bytes: int) -> None:
    sys.path.insert(0, str(HERE.parent / "tests" / "distributed"))
    from package_index import make_wheel

    for number in range(NUM_WHEELS):
        make_wheel(folder, f"bulk{number}", num_bytes=num_bytes)


if __name__ == "__main__":
    main()
