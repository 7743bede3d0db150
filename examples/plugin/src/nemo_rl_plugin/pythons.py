"""Registers the py_executable of each worker class of this distribution through an entry point."""

import json
from importlib import metadata

from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES


def this_distribution() -> str:
    """Return a requirement for this distribution, which the worker's venv needs as well."""
    installed = metadata.distribution("nemo-rl-plugin")
    source = installed.read_text("direct_url.json")  # exists if it was installed from a directory
    return f"nemo-rl-plugin @ {json.loads(source)['url']}" if source else f"nemo-rl-plugin=={installed.version}"


ACTOR_ENVIRONMENTS = {
    "nemo_rl_plugin.reverse_environment.ReverseEnvironment": PY_EXECUTABLES.SYSTEM,
    # An overlay over the base venv adds these packages for this class.
    "nemo_rl_plugin.distance_worker.DistanceWorker": (
        f"{PY_EXECUTABLES.BASE} --with rapidfuzz==3.14.1 --with '{this_distribution()}'"
    ),
}
