"""`nemo-rl env` lists, checks, plays and adds RL environments, without a model and without Ray."""

from __future__ import annotations

import contextlib
import json as json_module
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_rl.cli.options import Json
from nemo_rl.errors import ConfigError, EnvironmentFailure, VenvBuildError, VenvError

if TYPE_CHECKING:
    from nemo_rl.cli.env_targets import EnvironmentTarget
    from nemo_rl.environments.episode_check import PlayedEpisode, Policy

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="Name in the section env of --config, registered name, or package.module.name of a class."
    ),
]
Config = Annotated[
    str | None, typer.Option("--config", metavar="FILE|RECIPE", help="Configuration whose section env has the name.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value]...",
        help="With --config: section.key=value. Without: keys of the environment, such as config.size=3.",
    ),
]
Actions = Annotated[
    list[str] | None, typer.Option("--action", metavar="TEXT", help="Next action of the script. Repeatable.")
]
Script = Annotated[
    Path | None, typer.Option("--script", metavar="FILE", help="File with one action per line.", dir_okay=False)
]

_MAX_SHOWN = 40

app = typer.Typer(
    help="List, check, play and add RL environments.", no_args_is_help=True, pretty_exceptions_enable=False
)


@app.command("list")
def list_command(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE|RECIPE", help="Also list the environments of this file.")
    ] = None,
    json: Json = False,
) -> None:
    """List the registered environments and those of a configuration, with Python and state of the venv."""
    from nemo_rl.cli import display
    from nemo_rl.cli.env_targets import configured_environments, registered_targets, state_of

    if overrides and config is None:
        raise ConfigError(f"{overrides[0]}: overrides need a configuration; give --config FILE")
    targets = [] if config is None else configured_environments(config, overrides or [])
    targets += [target for target in registered_targets() if target.name not in {each.name for each in targets}]
    records = []
    for target in targets:
        python, state = state_of(target)
        records.append(
            {"name": target.name, "class": target.fqn, "python": python, "state": state, "source": target.source}
        )
    if json:
        display.print_json(records)
        return
    columns = ["name", "class", "source", "python", "state"]
    display.print_table(columns, [[record[column] for column in columns] for record in records])


@app.command()
def check(
    name: Name,
    overrides: Overrides = None,
    config: Config = None,
    problems: Annotated[int, typer.Option("--problems", "-n", min=1, help="Number of problems to play.")] = 4,
    actions: Actions = None,
    script: Script = None,
    json: Json = False,
) -> None:
    """Play two episodes of several problems with equal actions, and report what would disturb a job.

    The actions are random texts, or those of --action and --script. The exit code is 1 if there is an error.
    """
    from nemo_rl.cli import display
    from nemo_rl.cli.env_targets import problem_of, started
    from nemo_rl.environments.episode_check import check_environment

    target, python = _prepared(name, config, overrides, policy := _policy(actions, script))
    dataset = target.problems()
    records = [problem_of(dataset, index) for index in range(min(problems, len(dataset)))]
    with _interruptible(), started(target, python) as process:
        report = check_environment(
            process,
            records,
            max_turns=target.entry.max_turns,
            timeout_s=target.entry.step_timeout_s,
            policy=policy,
        )
        version = process.description["python"]
    if json:
        display.print_json(
            {
                "name": target.name,
                "class": target.fqn,
                "python": python,
                "episodes": [_record(episode) for episode in report.episodes],
                "errors": report.errors,
                "warnings": report.warnings,
            }
        )
    else:
        display.print_line(f"{target.name}: {target.fqn}, Python {version} ({python})\n")
        rows = [_row(episode) for episode in report.episodes]
        display.print_table(["problem", "begins with", "turns", "end", "reward", "s per reset", "s per step"], rows)
        for kind, sentences in (("error", report.errors), ("warning", report.warnings)):
            for sentence in sentences:
                display.print_line(f"\n{kind}: {sentence}")
        if not report.errors and not report.warnings:
            display.print_line("\nno errors")
    if report.errors:
        raise typer.Exit(1)


@app.command(name="try")
def try_command(
    name: Name,
    overrides: Overrides = None,
    config: Config = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Which problem to play: its position in the data set, from 0.")
    ] = 0,
    actions: Actions = None,
    script: Script = None,
    json: Json = False,
) -> None:
    """Play one episode. Each line of standard input is an action, unless --action or --script gives the actions.

    An action of several lines needs --action. The exit code is 1 if the actions end before the episode does.
    """
    from nemo_rl.cli import display
    from nemo_rl.cli.env_targets import problem_of, started
    from nemo_rl.environments.episode_check import PlayedEpisode, play_round

    policy = _policy(actions, script) or _read_action
    if policy is _read_action and sys.stdin is None:
        raise ConfigError("standard input is closed; give the actions with --action TEXT or --script FILE")
    target, python = _prepared(name, config, overrides, policy)
    episode = PlayedEpisode(seed, problem_of(target.problems(), seed))
    max_turns, timeout_s = target.entry.max_turns, target.entry.step_timeout_s
    show = (lambda text: None) if json else display.print_line
    stopped = ""
    with _interruptible(), started(target, python) as process:
        play_round(process, [episode], {0: ("reset", episode.problem)}, max_turns, timeout_s)
        shown = _show_messages(episode, 0, show)
        for tool in episode.tools:
            show(f"[tool] {json_module.dumps(tool, ensure_ascii=False)}")
        while not episode.end:
            turn = len(episode.rewards)
            try:
                action = policy(episode.problem, episode.messages, turn)
            except EOFError:
                stopped = f"the actions ended after {_count(turn)}, before the episode did"
                break
            if not _is_typed(policy):
                show(f"> {action}")
            play_round(process, [episode], {0: ("step", action)}, max_turns, timeout_s)
            shown = _show_messages(episode, shown + 1, show)
            if len(episode.rewards) > turn:
                info = "".join(f"  {key}={value:g}" for key, value in sorted(episode.info.items()))
                show(f"reward {episode.rewards[-1]:g}{info}")
    if json:
        display.print_json(
            {"name": target.name, **_record(episode), "messages": episode.messages, "tools": episode.tools}
        )
    elif not episode.failure:
        ends = {"max_turns": f"the episode was cut off by max_turns={max_turns}", "done": "the episode ended"}
        reason = ends.get(episode.end, "the environment cut the episode off" if episode.end else "stopped")
        display.print_line(f"\n{reason} after {_count(len(episode.rewards))}: total reward {episode.reward:g}")
    if episode.failure:
        raise EnvironmentFailure(episode.failure)
    if stopped:
        display.note(f"nemo-rl: {stopped}")
        raise typer.Exit(1)


@app.command()
def add(
    package: Annotated[
        str, typer.Argument(metavar="PACKAGE", help="Requirement, such as textarena or 'textarena>=0.7'.")
    ],
    json: Json = False,
) -> None:
    """Add the package of an environment to the project as an extra of its own, build its venv, and print what to write.

    The extra conflicts with those of other environments, so their packages may exclude one another. If the packages
    cannot be locked, nothing is changed.
    """
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    from nemo_rl import settings
    from nemo_rl.cli import display
    from nemo_rl.cli.project_file import add_environment_extra, lock, restored_on_failure
    from nemo_rl.distributed.ray_actor_environment_registry import uv_run
    from nemo_rl.environments.registry import registered_in
    from nemo_rl.venvs import ensure

    try:
        requirement = Requirement(package)
    except InvalidRequirement as error:
        raise ConfigError(f"{package!r} is not a requirement such as textarena>=0.7: {error}") from None
    requirement.name = canonicalize_name(requirement.name)
    project = settings.project_root()
    with restored_on_failure(project):
        extra, changes = add_environment_extra(project, requirement)
        display.note(f"nemo-rl: uv lock resolves the packages of {project}")
        try:
            lock(project, retry="run the command again")
        except VenvBuildError as error:
            raise VenvError(
                f"{error}\nIf {requirement.name} excludes the project's own packages, list it in a script with inline "
                "metadata (PEP 723), and set py_executable to the script's path and own_process to true."
            ) from error
    python = f"uv run --locked --extra {extra}"
    with _interruptible(), display.BuildView() as view:
        venv = ensure(
            uv_run("--extra", extra),
            f"environment-{requirement.name}",
            progress=lambda event: view.update(extra, event),
        )
    classes = registered_in(venv.python, requirement.name)
    shown = classes or {requirement.name: "my_package.my_module.MyEnvironment"}
    entries = {name: {"class": fqn, "py_executable": python} for name, fqn in shown.items()}
    if json:
        display.print_json({"project": str(project), "changes": changes, "registered": bool(classes), "env": entries})
        return
    display.print_line(f"{project / 'pyproject.toml'}: {'' if changes else 'nothing to add'}".rstrip())
    for change in changes:
        display.print_line(f"  {change}")
    if not classes:
        display.print_line(
            f"\n{requirement.name} registers no environment. Write a class with reset and step that uses it, in the "
            "project, and name it here:"
        )
    display.print_line("\nenv:")
    for name, entry in entries.items():
        display.print_line(f"  {name}:")
        for key, value in entry.items():
            display.print_line(f"    {key}: {value}")


def _prepared(
    name: str, config: str | None, overrides: Sequence[str] | None, policy: Policy | None
) -> tuple[EnvironmentTarget, str]:
    """Find an environment and build its venv. Return it with its interpreter."""
    from nemo_rl.cli import display
    from nemo_rl.cli.env_targets import find_environment, prepare

    target = find_environment(name, config, overrides or [])
    with _interruptible(), display.BuildView() as view:
        return target, prepare(target, view.update)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("\nnemo-rl: interrupted\n")
        raise typer.Exit(130) from None


def _policy(actions: Sequence[str] | None, script: Path | None) -> Policy | None:
    """Return a policy that takes the actions in turn; None if there are none. It raises `EOFError` at their end."""
    if script is not None:
        if actions:
            raise ConfigError("--action and --script cannot be combined; put all actions in the file")
        try:
            actions = script.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--script {script} cannot be read: {error}") from None
    if actions is None:
        return None
    listed = list(actions)

    def policy(problem: Any, messages: Any, turn: int) -> str:
        if turn >= len(listed):
            raise EOFError
        return listed[turn]

    return policy


def _read_action(problem: Any, messages: Any, turn: int) -> str:
    """Read an action from standard input. Raises `EOFError` at its end."""
    if sys.stdin.isatty():
        return input("> ")
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 text: {error}") from None
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _is_typed(policy: Policy) -> bool:
    """Return whether the terminal shows the actions already."""
    return policy is _read_action and sys.stdin.isatty()


def _show_messages(episode: PlayedEpisode, start: int, show: Any) -> int:
    """Show the messages from a position on, and return the position after them."""
    for message in episode.messages[start:]:
        content = message["content"]
        text = content if isinstance(content, str) else json_module.dumps(content, ensure_ascii=False)
        show(f"[{message['role']}] {text}")
    return len(episode.messages)


def _count(turns: int) -> str:
    return "1 turn" if turns == 1 else f"{turns} turns"


def _record(episode: PlayedEpisode) -> dict[str, Any]:
    steps = episode.step_s
    return {
        "problem": episode.index,
        "turns": len(episode.rewards),
        "end": episode.end or "stopped",
        "reward": episode.reward,
        "rewards": episode.rewards,
        "info": episode.info,
        "seconds_per_reset": round(episode.reset_s, 6),
        "seconds_per_step": round(sum(steps) / len(steps), 6) if steps else None,
        "failure": episode.failure or None,
    }


def _row(episode: PlayedEpisode) -> list[str]:
    record = _record(episode)
    begin = " ".join(str(episode.messages[0]["content"]).split()) if episode.messages else ""
    return [
        str(episode.index),
        begin if len(begin) <= _MAX_SHOWN else f"{begin[: _MAX_SHOWN - 3]}...",
        str(record["turns"]),
        record["end"],
        f"{episode.reward:g}",
        f"{episode.reset_s:.4f}",
        "" if record["seconds_per_step"] is None else f"{record['seconds_per_step']:.4f}",
    ]
