"""Starts a Megatron policy in a plain process. Prints the seconds until it is ready as JSON on the last line.

It runs with the interpreter of the MCORE venv, without Ray::

    PYTHONPATH=. <venv>/bin/python benchmarks/baselines/megatron_direct.py '{"model": ...}'
"""

from __future__ import annotations

import json
import sys
import time

STARTED = time.perf_counter()
SETTINGS = json.loads(sys.argv[1])

from nemo_rl.models.policy.config import PolicyConfig  # noqa: E402
from nemo_rl.models.policy.megatron_policy_worker import MegatronPolicyWorker  # noqa: E402

config = PolicyConfig(model_name=SETTINGS["model"], backend="megatron", num_threads=SETTINGS["num_threads"])
worker = MegatronPolicyWorker(config, total_steps=10, seed=0, device_type="cpu", weight_transport="local")
print(json.dumps({"ready_s": time.perf_counter() - STARTED}))
worker.shutdown()
