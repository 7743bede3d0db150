"""Command line of all jobs: `--config FILE`, `--dry-run`, dotted overrides, exit codes.

Exit codes: 0 the job finished; 1 the job failed; 2 the input is invalid (standard error has the error in one sentence,
and nothing was started); 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NoReturn

from nemo_rl import settings
from nemo_rl.errors import ConfigError, NemoRLError, causes, exit_code, sentence
from nemo_rl.jobs.hand_over import hand_over, report_imports_of_driver
from nemo_rl.utils.config import ConfigModel, ConfigT, iter_keys, load_config
from nemo_rl.utils.names import nearest_names

if TYPE_CHECKING:
    from types import FrameType

logger = logging.getLogger(__name__)

# Configurations that are installed with the package.
RECIPES = Path(settings.__file__).parent / "recipes"

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class CommandOptions(Generic[ConfigT]):
    """Extends the command line of a job that takes more than a configuration.

    Attributes:
        usage: arguments of the command, for its help.
        add: adds options to the parser. Positional arguments arrive in `overrides`.
        load: returns the configuration of the parsed arguments, and its name.
    """

    usage: str
    add: Callable[[argparse.ArgumentParser], None]
    load: Callable[[argparse.Namespace], tuple[ConfigT, str]]


@dataclass(frozen=True)
class JobArguments(Generic[ConfigT]):
    """Holds the arguments of a job.

    Attributes:
        config: the validated configuration.
        name: stem of the configuration file.
        dry_run: print the plan and start nothing.
    """

    config: ConfigT
    name: str
    dry_run: bool


def run_command(
    schema: type[ConfigT],
    default_config: Path | str,
    job: Callable[[JobArguments[ConfigT]], None],
    argv: Sequence[str] | None = None,
    *,
    program: str | None = None,
    options: CommandOptions[ConfigT] | None = None,
) -> int:
    """Parse the command line and run the job. Report an error as one sentence and an exit code.

    Example::

        sys.exit(run_command(MasterConfig, "grpo_math_embedded", run_grpo))

    Args:
        schema: the configuration class.
        default_config: YAML file, or name of a recipe of this package, that is used without `--config`.
        job: called with the parsed arguments. Its module has a `main(argv, *, program)` that calls this function.
        argv: the command line; None uses `sys.argv`.
        program: name of the command in its help; None uses `sys.argv`.
        options: further arguments of this job.

    Returns:
        The exit code (see the top of this module).
    """
    code = hand_over(job.__module__, argv, program)
    if code is not None:
        return code
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    parser = _parser(schema, default_config, program)
    if options is not None:
        parser.usage = f"%(prog)s {options.usage}"
        options.add(parser)
    arguments = parser.parse_intermixed_args(argv)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        if options is None:
            path = config_path(arguments.config)
            config, name = load_config(schema, path, arguments.overrides), path.stem
        else:
            config, name = options.load(arguments)
        with _interrupt_takes_precedence():
            job(JobArguments(config, name, arguments.dry_run))
        report_imports_of_driver()
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return 130
    except NemoRLError as error:
        if settings.TRACEBACK.get():
            raise
        print(f"error: {sentence(error)}", file=sys.stderr)
        return exit_code(error)
    except OSError as error:
        if error.errno not in _DISK_FULL or settings.TRACEBACK.get():
            raise
        print(f"error: {error}; free space and run the same command to resume from the checkpoint", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def config_path(file: Path | str) -> Path:
    """Return the path of a configuration: an existing file, or a recipe of this package by its name.

    Raises `ConfigError` with the nearest recipes if there is neither.
    """
    path = Path(file)
    recipe = RECIPES / f"{file}.yaml"
    if path.exists() or not recipe.exists():
        if path.exists() or path.suffix:
            return path  # an error of a missing file names it
        names = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        near = nearest_names(str(file), names) or names
        raise ConfigError(
            f"--config {file}: there is no such file, and no recipe of this name. Recipes: {', '.join(near)}"
        )
    return recipe


@contextlib.contextmanager
def _interrupt_takes_precedence() -> Iterator[None]:
    """Raise `KeyboardInterrupt` instead of an error that results from it, such as one of the clean-up."""
    try:
        yield
    except Exception as error:
        if not any(isinstance(cause, KeyboardInterrupt) for cause in causes(error)):
            raise
        logger.warning("after the interrupt: %s: %s", type(error).__name__, error)
        raise KeyboardInterrupt from error


def _interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


class _KeyListing(argparse.Action):
    """Implements `--help`: prints the usage and every configuration key."""

    def __init__(self, option_strings: Sequence[str], dest: str, schema: type[ConfigModel]) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show this message and all configuration keys")
        self._schema = schema

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        previous = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently in `--help | head`
        try:
            parser.print_help()
            print("\nconfiguration keys (type = default):")
            for key in iter_keys(self._schema):
                default = f" = {key.default}" if key.default else ""
                print(f"  {key.name}  ({key.type}{default})\n      {key.help}")
            sys.stdout.flush()
        finally:
            signal.signal(signal.SIGPIPE, previous)
        parser.exit()


def _parser(
    schema: type[ConfigModel], default_config: Path | str, program: str | None = None
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program, add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-h", "--help", action=_KeyListing, schema=schema)
    parser.add_argument(
        "--config",
        default=default_config,
        metavar="FILE",
        help=f"a YAML file, or the name of a recipe (default: {Path(default_config).stem})",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="validate the configuration and print the plan without starting the job"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="for example grpo.num_prompts_per_step=8; overrides the file",
    )
    return parser
