"""`nemo-rl rollouts` reads the samples that a run has kept: its conversations, their text, and statistics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nemo_rl.cli.options import Json
from nemo_rl.errors import ConfigError
from nemo_rl.utils.names import suggest_or_list

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the run, such as results/CONFIG/001.")]
Step = Annotated[int | None, typer.Option("--step", help="Only this training step.")]
Environment = Annotated[str | None, typer.Option("--environment", metavar="NAME", help="Only this environment.")]
Outcome = Annotated[
    str | None,
    typer.Option(
        "--outcome",
        metavar="trained|masked|replaced|scored|failed",
        help="Only samples with this outcome; scored and failed are those of evaluations.",
    ),
]

_OUTCOMES = ("trained", "masked", "replaced", "scored", "failed")
_PLACE = ("step", "environment", "sample")
_ABOUT = (
    *_PLACE,
    "problem",
    "group",
    "num_tokens",
    "turns",
    "reward",
    "advantage",
    "end",
    "outcome",
    "failure",
    "attempts",
    "weights_version",
    "venv_digest",
    "messages",
)

app = typer.Typer(
    help="Read the conversations that a run has kept.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command("show")
def show_command(
    run: Run,
    step: Annotated[int | None, typer.Option("--step", help="Training step. Default: the last one.")] = None,
    environment: Environment = None,
    sample: Annotated[int | None, typer.Option("--sample", metavar="I", help="Only the sample of this number.")] = None,
    outcome: Outcome = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=0, help="Most samples; 0: all.")] = 10,
    json: Json = False,
) -> None:
    """Print the conversations of a step, with the reward of each action."""
    from nemo_rl.cli import display
    from nemo_rl.observability.rollout_files import open_rollouts

    files = open_rollouts(run)
    rows = list(_rows(files, _ABOUT, max(files) if step is None else step, environment, outcome))
    if sample is not None:
        rows = [row for row in rows if row["sample"] == sample]
    shown = rows[:limit] if limit else rows
    if json:
        display.print_json(shown)
    else:
        for row in shown:
            display.print_line(_conversation(row))
    if len(shown) < len(rows):
        display.note(f"{len(rows) - len(shown)} more samples; --limit 0 shows all")
    if not rows:
        display.note("no sample matches")
        raise typer.Exit(1)


@app.command("grep")
def grep_command(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="Regular expression, as of Python's re.")],
    run: Run,
    step: Step = None,
    environment: Environment = None,
    outcome: Outcome = None,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", "-i", help="Ignore upper and lower case.")] = False,
    json: Json = False,
) -> None:
    """Print the lines of messages that match, with step, environment, sample and role. Exit code 1: none does."""
    from nemo_rl.cli import display
    from nemo_rl.observability.rollout_files import message_text, open_rollouts
    from nemo_rl.utils.text import printable

    try:
        expression = re.compile(pattern, re.MULTILINE | (re.IGNORECASE if ignore_case else 0))
    except re.error as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from error
    matches = []
    for row in _rows(open_rollouts(run), (*_PLACE, "outcome", "messages"), step, environment, outcome):
        for index, message in enumerate(row["messages"]):
            for line in _matching_lines(expression, message_text(message)):
                place = {key: row[key] for key in _PLACE}
                matches.append({**place, "message": index, "role": message["role"], "line": line})
                if not json:
                    step_name = f"step {row['step']}  {row['environment']}  sample {row['sample']}"
                    display.print_line(f"{step_name}  {message['role']}: {printable(line)}")
    if json:
        display.print_json(matches)
    if not matches:
        raise typer.Exit(1)


@app.command("stats")
def stats_command(
    run: Run,
    environment: Environment = None,
    ranges: Annotated[int, typer.Option("--ranges", metavar="N", min=1, help="Most ranges of steps.")] = 5,
    json: Json = False,
) -> None:
    """Print episodes, rewards, lengths and ends, per environment and range of steps."""
    from nemo_rl.cli import display
    from nemo_rl.observability.rollout_files import open_rollouts

    files = open_rollouts(run)
    range_of = _ranges(list(files), ranges)
    columns = ("step", "environment", "reward", "turns", "num_tokens", "outcome", "end")
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in _rows(files, columns, None, environment, None):
        cells.setdefault((row["environment"], range_of[row["step"]]), []).append(row)
    order = {name: index for index, name in enumerate(dict.fromkeys(range_of.values()))}
    summaries = [
        {"environment": name, "steps": steps, **_summary(cells[name, steps])}
        for name, steps in sorted(cells, key=lambda cell: (cell[0], order[cell[1]]))
    ]
    if json:
        display.print_json(summaries)
        return
    names = ("environment", "steps", "episodes", "reward", "turns", "tokens", "masked", "failed", "replaced", "ends")
    display.print_table(names, [_table_row(summary) for summary in summaries])


def _rows(
    files: dict[int, Path], columns: Sequence[str], step: int | None, environment: str | None, outcome: str | None
) -> Iterator[dict[str, Any]]:
    """Read the samples that the options choose. Raises `ConfigError` for a step or environment that is not there."""
    from nemo_rl.observability.rollout_files import read_rollouts

    if step is not None and step not in files:
        raise ConfigError(
            f"--step {step}: the run has kept the rollouts of steps {min(files)} to {max(files)}; older ones are "
            "removed beyond logger.max_rollouts_mb"
        )
    if outcome is not None and outcome not in _OUTCOMES:
        raise ConfigError(f"--outcome {outcome}: unknown outcome{suggest_or_list(outcome, _OUTCOMES)}")
    names = set()
    for row in read_rollouts(list(files.values()) if step is None else [files[step]], (*columns, "branch")):
        if row.pop("branch"):
            continue  # the first row of its sample has the conversation with all its branches
        names.add(row["environment"])
        is_chosen = environment is None or row["environment"] == environment
        if is_chosen and (outcome is None or row["outcome"].partition(":")[0] == outcome):
            yield row
    if environment is not None and environment not in names:
        raise ConfigError(
            f"--environment {environment}: no sample is of this environment{suggest_or_list(environment, names)}"
        )


def _conversation(row: dict[str, Any]) -> str:
    from nemo_rl.observability.rollout_files import message_text
    from nemo_rl.utils.text import printable

    facts = [f"step {row['step']}", row["environment"], f"sample {row['sample']}"]
    if row["problem"] is not None:
        facts.append(f"problem {row['problem']}")
    if row["group"] is not None:
        facts.append(f"group {row['group']}")
    lines = [f"=== {'  '.join(facts)}"]
    for message in row["messages"]:
        reward = f"  reward {message['reward']:g}" if message.get("reward") is not None else ""
        branch = f"  ({message['branch']})" if message.get("branch") else ""
        lines += [f"[{message['role']}]{branch}{reward}", printable(message_text(message))]
    reward = "no reward" if row["reward"] is None else f"reward {row['reward']:g}"
    advantage = "" if row["advantage"] is None else f", advantage {row['advantage']:.3g}"
    lines.append(
        f"--- {reward}{advantage}; end: {row['end']}; {row['outcome']}; {row['turns']} turns, {row['num_tokens']} "
        f"tokens; weights of step {row['weights_version']}"
    )
    if row["failure"]:
        lines.append(f"    failure: {printable(row['failure'])}")
    return "\n".join(lines) + "\n"


def _matching_lines(expression: re.Pattern[str], text: str) -> Iterator[str]:
    end = -1
    for match in expression.finditer(text):
        if match.start() <= end:
            continue  # in a line that is shown already
        start = text.rfind("\n", 0, match.start()) + 1
        end = text.find("\n", match.end())
        end = len(text) if end < 0 else end
        yield text[start:end]


def _ranges(steps: Sequence[int], count: int) -> dict[int, str]:
    """Divide the steps into at most `count` ranges of equal length, and name the range of each step."""
    length = -(-len(steps) // count)
    names: dict[int, str] = {}
    for start in range(0, len(steps), length):
        part = steps[start : start + length]
        name = str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}"
        names |= dict.fromkeys(part, name)
    return names


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarize samples. Replaced ones are only counted; failed ones have neither reward nor length."""
    kept = [row for row in rows if not row["outcome"].startswith("replaced")]
    valid = [row for row in kept if row["end"] != "failed"]

    def mean(column: str) -> float | None:
        return sum(row[column] for row in valid) / len(valid) if valid else None

    return {
        "episodes": len(kept),
        "reward": mean("reward"),
        "turns": mean("turns"),
        "tokens": mean("num_tokens"),
        "masked": sum(row["outcome"] == "masked" for row in kept),
        "failed": len(kept) - len(valid),
        "replaced": len(rows) - len(kept),
        "ends": dict(Counter(row["end"] for row in kept).most_common()),
    }


def _table_row(summary: dict[str, Any]) -> list[str]:
    def number(name: str, digits: int) -> str:
        return "" if summary[name] is None else f"{summary[name]:.{digits}f}"

    ends = ", ".join(f"{reason} {count}" for reason, count in summary["ends"].items())
    counts = [str(summary[name]) for name in ("masked", "failed", "replaced")]
    means = [number("reward", 3), number("turns", 1), number("tokens", 1)]
    return [summary["environment"], summary["steps"], str(summary["episodes"]), *means, *counts, ends]
