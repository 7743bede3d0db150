"""The `nemo-rl` command line, a thin layer over the other packages. See docs/cli.md.

Modules import their dependencies lazily, because nodes with only Ray installed run the checks of `nemo-rl doctor`.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit with its code."""
    from nemo_rl.cli.app import run

    run()
