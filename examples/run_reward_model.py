"""Trains a reward model on preference pairs, like `nemo-rl reward-model`.

uv run examples/run_reward_model.py                                         # embedded model and data, no GPU needed
uv run examples/run_reward_model.py reward_model.seed=1 logger.log_dir=results/x     # any key of the configuration
uv run examples/run_reward_model.py policy.model_name=Qwen/Qwen2.5-0.5B-Instruct data.train.path=pairs.jsonl --dry-run
"""

import sys

from nemo_rl.jobs.reward_model_job import main

if __name__ == "__main__":
    sys.exit(main())
