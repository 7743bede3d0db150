"""Registers the py_executable of each worker class through an entry point."""

import json
from importlib import metadata

from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES


def this_distribution() -> str:
    """Return a requirement for this distribution, which the worker needs too."""
    installed = metadata.distribution("nemo-rl-plugin")
    # This file exists if the distribution was installed from a directory.
    source = installed.read_text("direct_url.json")
    if source:
        return f"nemo-rl-plugin @ {json.loads(source)['url']}"
    return f"nemo-rl-plugin=={installed.version}"


ACTOR_ENVIRONMENTS = {
    "nemo_rl_plugin.reverse_environment.ReverseEnvironment": PY_EXECUTABLES.SYSTEM,
    # An overlay over the base venv adds these packages for this class.
    "nemo_rl_plugin.distance_worker.DistanceWorker": (
        f"{PY_EXECUTABLES.BASE} --with rapidfuzz==3.14.1 --with '{this_distribution()}'"
    ),
}
