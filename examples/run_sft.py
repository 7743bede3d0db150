"""Fine-tunes a model on conversations, like `nemo-rl sft`.

uv run examples/run_sft.py                                         # embedded model and data, no GPU needed
uv run examples/run_sft.py sft.seed=1 logger.log_dir=results/x     # any key of the configuration
uv run examples/run_sft.py policy.model_name=Qwen/Qwen2.5-0.5B-Instruct data.train.path=chats.jsonl --dry-run
"""

import sys

from nemo_rl.jobs.sft_job import main

if __name__ == "__main__":
    sys.exit(main())
