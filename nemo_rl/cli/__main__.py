"""`python -m nemo_rl.cli`, for where the `nemo-rl` script is not on PATH."""

from nemo_rl.cli import main

main()
