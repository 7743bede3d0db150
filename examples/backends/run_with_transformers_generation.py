"""Run the GRPO job with the backend of transformers_generation_worker.py.

uv run examples/backends/run_with_transformers_generation.py grpo.max_num_steps=3
"""

import sys

from nemo_rl.distributed.ray_actor_environment_registry import register_actor_environment
from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
from nemo_rl.jobs.grpo_job import main
from nemo_rl.models.backends import GENERATION_BACKENDS, Backend

WORKER = "transformers_generation_worker.TransformersGenerationWorker"

GENERATION_BACKENDS["transformers"] = Backend(WORKER)
register_actor_environment(WORKER, PY_EXECUTABLES.BASE)

if __name__ == "__main__":
    # Ray workers can import modules beside the driver's script, so the worker class need not be installed in its venv.
    sys.exit(main(["policy.generation.backend=transformers", *sys.argv[1:]]))
