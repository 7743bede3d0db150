"""Curates raw math problems into training data: repairs, deduplicates, verifies and grades them.

uv run examples/run_curate_math.py                                     # generated sample, no GPU needed
uv run examples/run_curate_math.py input.paths=[raw/] output_dir=results/mine
uv run examples/run_curate_math.py scoring.model=DIRECTORY scoring.num_samples=8   # difficulty from pass rates
uv run examples/run_grpo_math.py data.train.path=results/curate_math/problems.parquet
"""

import sys

from nemo_rl.jobs.curate_math import main

if __name__ == "__main__":
    sys.exit(main())
