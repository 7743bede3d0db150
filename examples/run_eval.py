"""Evaluates models and checkpoints, like `nemo-rl eval`.

uv run examples/run_eval.py embedded                                    # embedded model and data, no GPU needed
uv run examples/run_eval.py results/grpo_math_embedded/001 embedded     # the best checkpoint of a run, and its start
uv run examples/run_eval.py embedded --data problems.jsonl eval.num_generations=8 eval.subject_key=topic
"""

import sys

from nemo_rl.jobs.eval_job import main

if __name__ == "__main__":
    sys.exit(main())
