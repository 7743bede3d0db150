"""`nemo-rl ...`: a thin face over the rooms below. See docs/cli.md.

Nothing is imported before it is needed: nodes that have nothing but Ray run the checks of `nemo-rl doctor`.
"""

from __future__ import annotations


def main() -> None:
    """Entry point: run the command line and exit with its code."""
    from nemo_rl.cli.app import run

    run()
