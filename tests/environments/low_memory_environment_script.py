"""Lets Ray's memory monitor kill an environment, for test_remote; prints the reward and the failure as JSON.

`low_memory_environment_script.py MEMINFO`
"""

from __future__ import annotations

import json
import sys

from simulated_memory import exhaust_memory

from nemo_rl.distributed.cluster.session import start_local_ray
from nemo_rl.environments.config import EnvironmentConfig
from nemo_rl.environments.remote import RemoteEnvironment
from nemo_rl.errors import EnvironmentFailure


def main(meminfo: str) -> None:
    start_local_ray(num_cpus=2, num_gpus=0)
    environment = RemoteEnvironment(EnvironmentConfig())
    sample = ([r"\boxed{2}"], [{"ground_truth": "2"}])
    result = {"reward": environment.step(*sample).rewards.tolist(), "failure": ""}
    exhaust_memory(meminfo)
    try:
        while True:
            environment.step(*sample)
    except EnvironmentFailure as error:
        result["failure"] = str(error)
    environment.shutdown()
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
