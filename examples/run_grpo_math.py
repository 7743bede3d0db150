"""Trains a model on math problems with GRPO, like `nemo-rl grpo`.

uv run examples/run_grpo_math.py                                        # embedded model and data, no GPU needed
uv run examples/run_grpo_math.py grpo.seed=1 logger.log_dir=results/x   # any key of the configuration
uv run examples/run_grpo_math.py --config examples/configs/grpo_math_1B.yaml --dry-run
"""

import sys

from nemo_rl.jobs.grpo_job import main

if __name__ == "__main__":
    sys.exit(main())
