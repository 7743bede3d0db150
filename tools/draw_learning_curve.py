"""Draw the learning curve of a run from its metrics.

uv run examples/run_grpo_math.py
python tools/draw_learning_curve.py results/grpo_math_embedded/001/metrics.jsonl docs/images/learning_curve.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def read_curves(metrics: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Mean reward and validation accuracy by step."""
    reward: dict[int, float] = {}
    accuracy: dict[int, float] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "train/reward" in record:
            reward[record["step"]] = record["train/reward"]
        if "val/accuracy" in record:
            accuracy[record["step"]] = record["val/accuracy"]
    return reward, accuracy


def draw(metrics: Path, target: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "learning_curve"  # equal metrics give an equal file
    reward, accuracy = read_curves(metrics)
    figure = Figure(figsize=(6.0, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(reward), list(reward.values()), color="#9aa3b5", linewidth=1, label="mean reward of a step")
    axes.plot(
        list(accuracy), list(accuracy.values()), color="#1d4ed8", marker="o", markersize=4, label="validation accuracy"
    )
    first, last = min(accuracy), max(accuracy)
    for step, offset in ((first, (8, -8)), (last, (-12, 7))):
        axes.annotate(f"{accuracy[step]:.2f}", (step, accuracy[step]), textcoords="offset points", xytext=offset)
    axes.set(xlabel="training step", ylabel="share of correct answers", ylim=(0, 1.08), xlim=(0, last * 1.03))
    axes.set_title("Default run: two-digit additions, 2 CPU cores", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, help="metrics.jsonl of a run")
    parser.add_argument("target", type=Path, help="SVG or PNG to write")
    arguments = parser.parse_args()
    draw(arguments.metrics, arguments.target)


if __name__ == "__main__":
    main()
