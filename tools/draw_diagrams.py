"""Draw the diagrams of the documentation as SVG files. A test fails when a committed file differs.

    python tools/draw_diagrams.py

The files need no JavaScript and no network in the reader's browser. To change a diagram, edit its function here and
run the tool.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"

FONT = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"
INK, MUTED = "#1c2330", "#475066"
LINE = "#5b6478"
# Fill and border of a box.
COLORS = {
    "blue": ("#eef2ff", "#6a7ee0"),
    "green": ("#e9f7ef", "#3fa46a"),
    "orange": ("#fff4e5", "#d9902f"),
    "red": ("#fdecef", "#d1586f"),
    "grey": ("#f6f7f9", "#9aa3b5"),
}


@dataclass(frozen=True)
class Box:
    """A rectangle around its centre, with a title and smaller lines below it."""

    x: float
    y: float
    title: str
    lines: tuple[str, ...] = ()
    color: str = "grey"
    width: float = 150
    height: float = 54

    def svg(self) -> str:
        fill, border = COLORS[self.color]
        parts = [
            f'<rect x="{self.x - self.width / 2:g}" y="{self.y - self.height / 2:g}" width="{self.width:g}" '
            f'height="{self.height:g}" rx="8" fill="{fill}" stroke="{border}" stroke-width="1.5"/>'
        ]
        top = self.y + 5 - 9 * len(self.lines)
        parts.append(text(self.x, top, self.title, size=14, weight=600))
        parts += [text(self.x, top + 18 * (n + 1), line, color=MUTED) for n, line in enumerate(self.lines)]
        return "\n".join(parts)

    def border_towards(self, x: float, y: float) -> tuple[float, float]:
        """The point of the border, with a small gap, on the way from the centre to (x, y)."""
        dx, dy = x - self.x, y - self.y
        across = (self.width / 2 + 3) / abs(dx) if dx else math.inf
        down = (self.height / 2 + 3) / abs(dy) if dy else math.inf
        share = min(across, down)
        return self.x + dx * share, self.y + dy * share


def text(
    x: float,
    y: float,
    content: str,
    *,
    size: float = 12,
    weight: int = 400,
    color: str = INK,
    anchor: str = "middle",
    halo: float = 0,
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size:g}" font-weight="{weight}" '
        f'fill="{color}" paint-order="stroke" stroke="#ffffff" stroke-width="{halo:g}">{escape(content)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, *, dashed: bool = False, head: bool = True) -> str:
    style = ' stroke-dasharray="5 4"' if dashed else ""
    marker = ' marker-end="url(#head)"' if head else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{LINE}" stroke-width="1.5"'
        f"{style}{marker}/>"
    )


def arrow(start: Box, end: Box, label: str = "", *, dashed: bool = False, shift: tuple[float, float] = (0, -6)) -> str:
    x1, y1 = start.border_towards(end.x, end.y)
    x2, y2 = end.border_towards(start.x, start.y)
    drawn = line(x1, y1, x2, y2, dashed=dashed)
    if label:
        drawn += "\n" + text((x1 + x2) / 2 + shift[0], (y1 + y2) / 2 + shift[1], label, size=11.5, color=LINE)
    return drawn


def drawing(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="{FONT}" role="img">\n'
        f"<title>{escape(title)}</title>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>\n'
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def sequence(title: str, names: list[str], steps: list[tuple[str, str, str]], width: float = 920) -> str:
    """A sequence diagram. A step is (from, to, text); an empty `to` is a heading across the whole width."""
    gap = width / len(names)
    xs = {name: gap * (n + 0.5) for n, name in enumerate(names)}
    row, y = 34, 76.0
    bottom = y + row * len(steps)
    parts = [line(x, 58, x, bottom, dashed=True, head=False) for x in xs.values()]
    parts += [Box(x, 34, name, color="blue", width=gap - 24, height=40).svg() for name, x in xs.items()]
    for start, end, content in steps:
        if not end:
            parts.append(f'<rect x="12" y="{y - 14:g}" width="{width - 24:g}" height="22" rx="4" fill="#f6f7f9"/>')
            parts.append(text(22, y + 1, content, size=12, weight=600, color=MUTED, anchor="start"))
        elif start == end:
            x = xs[start]
            parts.append(
                f'<path d="M{x + 3:g},{y - 10:g} h26 v14 h-24" fill="none" stroke="{LINE}" stroke-width="1.5" '
                'marker-end="url(#head)"/>'
            )
            last = start == names[-1]
            parts.append(text(x - 8 if last else x + 36, y + 1, content, anchor="end" if last else "start", halo=4))
        else:
            sign = 1 if xs[end] > xs[start] else -1
            parts.append(line(xs[start] + 3 * sign, y + 4, xs[end] - 3 * sign, y + 4))
            middle = (xs[start] + xs[end]) / 2
            parts.append(text(middle, y - 2, content, halo=4))
        y += row
    return drawing(width, bottom + 12, title, parts)


def import_order() -> str:
    cli = Box(460, 40, "cli", ("nemo-rl ...",), "blue")
    jobs = Box(460, 130, "jobs", ("assembles a job",), "blue")
    algorithms = Box(280, 220, "algorithms", ("interfaces only",), "orange")
    pipelines = Box(690, 220, "pipelines", ("a Python per stage",), "orange")
    models = Box(160, 320, "models", (), "green")
    environments = Box(400, 320, "environments", (), "green")
    data = Box(280, 410, "data", (), "green")
    distributed = Box(460, 500, "distributed", ("Ray",), "red")
    venvs = Box(460, 590, "venvs", ("no Ray, no torch",), "red")
    services = Box(760, 500, "observability, utils", ("serve every package",), "grey", 190)
    boxes = [cli, jobs, algorithms, pipelines, models, environments, data, distributed, venvs, services]
    pairs = [
        (cli, jobs),
        (jobs, algorithms),
        (jobs, pipelines),
        (algorithms, models),
        (algorithms, environments),
        (models, data),
        (environments, data),
        (data, distributed),
        (pipelines, environments),
        (pipelines, distributed),
        (distributed, venvs),
        (distributed, services),
    ]
    parts = [box.svg() for box in boxes] + [arrow(start, end) for start, end in pairs]
    return drawing(920, 640, "Which package imports which; arrows point to the imported package", parts)


def job_start() -> str:
    script, jobs, venvs, cluster, workers = "script", "jobs.grpo_job", "venv engine", "RayVirtualCluster", "workers"
    return sequence(
        "From the command to the first training step",
        [script, jobs, venvs, cluster, workers],
        [
            (script, jobs, "configuration, validated"),
            (jobs, venvs, "make all venvs ready"),
            (venvs, venvs, "build what is missing"),
            (jobs, jobs, "load model, data"),
            (venvs, jobs, "ready on every node"),
            (jobs, cluster, "reserve bundles: GPUs are held from here"),
            (jobs, workers, "start policy, generation and environment workers"),
            (workers, jobs, "attestation: digest, Python, Ray, node"),
            (jobs, jobs, "GRPO.run"),
        ],
    )


def grpo_step() -> str:
    loader = Box(110, 60, "PromptLoader", ("problems",), "blue")
    rollouts = Box(330, 60, "rollouts", ("collect",), "blue")
    advantages = Box(560, 60, "advantages", ("per group",), "blue")
    batch = Box(790, 60, "training batch", ("sharded",), "blue")
    generation = Box(210, 230, "generation workers", ("sample completions",), "orange", 180)
    environment = Box(450, 230, "environment", ("computes rewards",), "red", 160)
    policy = Box(730, 230, "policy workers", ("log-probabilities,", "loss, optimizer step"), "green", 190, 74)
    recorder = Box(820, 370, "recorder", ("metrics, checkpoint",), "grey", 160)
    sync = f'<path d="M700,269 V330 H210 V262" fill="none" stroke="{LINE}" stroke-width="1.5" marker-end="url(#head)"/>'
    parts = [
        *(b.svg() for b in (loader, rollouts, advantages, batch, generation, environment, policy, recorder)),
        arrow(loader, rollouts),
        arrow(rollouts, advantages),
        arrow(advantages, batch),
        arrow(rollouts, generation, "prompts, completions", shift=(-78, 0)),
        arrow(rollouts, environment, "completions, rewards", shift=(74, 0)),
        arrow(batch, policy, "shards", shift=(32, 0)),
        arrow(policy, recorder, "metrics", shift=(40, -2)),
        sync,
        text(455, 322, "weights with version and digest", size=11.5, color=LINE),
    ]
    return drawing(920, 412, "Data flow of one GRPO step", parts)


def venv_lifecycle() -> str:
    ensure = Box(80, 60, "ensure", (), "blue", 100, 44)
    resolve = Box(230, 60, "resolve", ("plan, digest",), "grey", 120)
    sealed = Box(390, 60, "sealed?", (), "orange", 100, 44)
    ready = Box(800, 60, "ready", (), "green", 110, 44)
    lock = Box(390, 160, "build lock", ("others wait",), "orange", 120)
    again = Box(560, 160, "sealed now?", (), "orange", 120, 44)
    names = ["fetch", "link", "compile", "check", "manifest", "publish"]
    steps = [Box(100 + 140 * n, 270, name, (), "grey", 106, 44) for n, name in enumerate(names)]
    failed = Box(310, 370, "typed error", ("the new directory is removed",), "red", 220)
    parts = [b.svg() for b in (ensure, resolve, sealed, ready, lock, again, *steps, failed)]
    parts += [
        arrow(ensure, resolve),
        arrow(resolve, sealed),
        arrow(sealed, ready, "yes"),
        arrow(sealed, lock, "no", shift=(14, 4)),
        arrow(lock, again),
        arrow(again, ready, "yes"),
        f'<path d="M560,185 V218 H100 V245" fill="none" stroke="{LINE}" stroke-width="1.5" marker-end="url(#head)"/>',
        text(330, 212, "no", size=11.5, color=LINE),
        *(arrow(one, other) for one, other in itertools.pairwise(steps)),
        arrow(steps[-1], ready),
        *(arrow(step, failed, dashed=True) for step in steps[:4]),
    ]
    return drawing(920, 412, "Life of a venv: from the request to the published, sealed directory", parts)


def worker_start() -> str:
    driver, venvs, initializer, workers = "driver", "venv engine", "initializer", "workers"
    return sequence(
        "Start of a worker group",
        [driver, venvs, initializer, workers],
        [
            (driver, venvs, "is the venv ready? (build it if not)"),
            (venvs, driver, "interpreter, digest"),
            ("", "", "Only for a new class, or one with configure_worker"),
            (driver, initializer, "import the module, describe the class"),
            (initializer, driver, "method names and options (cached on disk)"),
            ("", "", "All workers at once"),
            (driver, driver, "reserve bundles, choose ports"),
            (driver, workers, "create the actors"),
            (workers, workers, "set variables, import, construct"),
            (workers, driver, "attestation: venv digest, Python, Ray, node, pid"),
            (
                "",
                "",
                "If one worker dies, is in the wrong venv or is late: all are stopped and its traceback is raised",
            ),
        ],
    )


def broadcast_tree() -> str:
    index = Box(460, 36, "package index", (), "grey", 160, 40)
    builder = Box(460, 126, "driver's node", ("builds and seals",), "blue", 170)
    first = [Box(x, 230, f"node {n}", (), "green", 110, 40) for n, x in ((1, 240), (2, 680))]
    second = [Box(x, 320, f"node {n}", (), "green", 110, 40) for n, x in ((3, 130), (4, 350), (5, 570), (6, 790))]
    parts = [b.svg() for b in (index, builder, *first, *second)]
    parts.append(arrow(index, builder, "once", shift=(22, 4)))
    parts += [arrow(builder, node, "chunks", shift=(-14 if node.x < 460 else 14, -8)) for node in first]
    parts += [arrow(first[0], second[0]), arrow(first[0], second[1]), arrow(first[1], second[2])]
    parts.append(arrow(first[1], second[3]))
    return drawing(920, 356, "A sealed venv is broadcast from node to node in a tree", parts)


DIAGRAMS: dict[str, Callable[[], str]] = {
    "import_order": import_order,
    "job_start": job_start,
    "grpo_step": grpo_step,
    "venv_lifecycle": venv_lifecycle,
    "worker_start": worker_start,
    "broadcast_tree": broadcast_tree,
}


if __name__ == "__main__":
    for name, draw in DIAGRAMS.items():
        (IMAGES / f"{name}.svg").write_text(draw(), encoding="utf-8")
