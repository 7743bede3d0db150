"""Trains a model on preference pairs by DPO, like `nemo-rl dpo`.

uv run examples/run_dpo.py                                         # embedded model and data, no GPU needed
uv run examples/run_dpo.py dpo.seed=1 logger.log_dir=results/x     # any key of the configuration
uv run examples/run_dpo.py policy.model_name=Qwen/Qwen2.5-0.5B-Instruct data.train.path=pairs.jsonl --dry-run
"""

import sys

from nemo_rl.jobs.dpo_job import main

if __name__ == "__main__":
    sys.exit(main())
