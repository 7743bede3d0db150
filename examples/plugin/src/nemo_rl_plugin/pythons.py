"""Which Python each class of this distribution runs in. Read by nemo_rl through an entry point."""

import json
from importlib import metadata

from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES


def this_distribution() -> str:
    """A requirement for what holds this very file: a worker's venv needs the plugin, too."""
    installed = metadata.distribution("nemo-rl-plugin")
    source = installed.read_text("direct_url.json")  # there when it was installed from a directory
    return f"nemo-rl-plugin @ {json.loads(source)['url']}" if source else f"nemo-rl-plugin=={installed.version}"


ACTOR_ENVIRONMENTS = {
    "nemo_rl_plugin.reverse_environment.ReverseEnvironment": PY_EXECUTABLES.SYSTEM,
    # The base venv stays as it is; these packages are laid over it, for this class alone.
    "nemo_rl_plugin.distance_worker.DistanceWorker": (
        f"{PY_EXECUTABLES.BASE} --with rapidfuzz==3.14.1 --with '{this_distribution()}'"
    ),
}
