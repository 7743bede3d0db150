"""Trains a model on math problems with GRPO.

uv run examples/run_grpo_math.py                                        # embedded model and data, no GPU needed
uv run examples/run_grpo_math.py grpo.seed=1 logger.log_dir=results/x   # any key of the configuration
uv run examples/run_grpo_math.py --config examples/configs/grpo_math_1B.yaml --dry-run
"""

import sys
from pathlib import Path

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.jobs.command_line import run_command
from nemo_rl.jobs.grpo_job import run_grpo

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "grpo_math_embedded.yaml"

if __name__ == "__main__":
    sys.exit(run_command(MasterConfig, DEFAULT_CONFIG, run_grpo))
