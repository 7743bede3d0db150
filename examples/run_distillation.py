"""Trains a student on a teacher's predictions for the student's own samples, like `nemo-rl distill`.

uv run examples/run_distillation.py                                       # embedded models, no GPU needed
uv run examples/run_distillation.py teacher.model_name=results/teacher    # the best checkpoint of a run
uv run examples/run_distillation.py distillation.objective=top_k distillation.top_k=8 --dry-run
"""

import sys

from nemo_rl.jobs.distillation_job import main

if __name__ == "__main__":
    sys.exit(main())
