"""The command line that every job shares: `--config FILE`, `--dry-run`, dotted overrides, exit codes.

Exit codes: 0 the job is done; 2 the input is wrong (one sentence on standard error says what, and nothing was
started); 1 something failed while it ran; 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NoReturn

from nemo_rl import settings
from nemo_rl.errors import NemoRLError, exit_code, sentence
from nemo_rl.utils.config import ConfigModel, ConfigT, iter_keys, load_config

if TYPE_CHECKING:
    from types import FrameType

logger = logging.getLogger(__name__)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class JobArguments(Generic[ConfigT]):
    """What the user asked for: the checked configuration, its name (the file's), and whether to only plan."""

    config: ConfigT
    name: str
    dry_run: bool


def run_command(
    schema: type[ConfigT],
    default_config: Path,
    job: Callable[[JobArguments[ConfigT]], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the command line, run the job, and turn what goes wrong into one sentence and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    arguments = _parser(schema, default_config).parse_intermixed_args(argv)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        config = load_config(schema, arguments.config, arguments.overrides)
        job(JobArguments(config, arguments.config.stem, arguments.dry_run))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except NemoRLError as error:
        if settings.TRACEBACK.get():
            raise
        print(f"error: {sentence(error)}", file=sys.stderr)
        return exit_code(error)
    except OSError as error:
        if error.errno not in _DISK_FULL or settings.TRACEBACK.get():
            raise
        print(f"error: {error}; make room, and the same command goes on from the last checkpoint", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


class _KeyListing(argparse.Action):
    """`--help`: the usual text, then every key of the configuration."""

    def __init__(self, option_strings: Sequence[str], dest: str, schema: type[ConfigModel]) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show this message and every configuration key")
        self._schema = schema

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        previous = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends as other programs do
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


def _parser(schema: type[ConfigModel], default_config: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-h", "--help", action=_KeyListing, schema=schema)
    parser.add_argument(
        "--config", type=Path, default=default_config, metavar="FILE", help=f"YAML (default: {default_config.name})"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="e.g. grpo.num_prompts_per_step=8; wins over the file"
    )
    return parser
