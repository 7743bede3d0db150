"""Runs the command line as `python -m nemo_rl.cli` if the `nemo-rl` script is not on PATH."""

from nemo_rl.cli import main

main()
