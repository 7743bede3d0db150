"""The registry of weight transports. A new transport is one class and one line in `TRANSPORTS`."""

from __future__ import annotations

from collections.abc import Callable

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.cuda_ipc import CudaIpcTransport
from nemo_rl.models.weights.local import LocalTransport
from nemo_rl.models.weights.pairs import GlooTransport, NcclTransport
from nemo_rl.models.weights.ray_object_store import RayObjectStoreTransport
from nemo_rl.models.weights.shared_memory import SharedMemoryTransport
from nemo_rl.models.weights.transport import WeightTransport
from nemo_rl.utils.names import did_you_mean

TRANSPORTS: dict[str, Callable[[], WeightTransport]] = {
    "ray": RayObjectStoreTransport,
    "shared_memory": SharedMemoryTransport,
    "gloo": GlooTransport,
    "cuda_ipc": CudaIpcTransport,
    "nccl": NcclTransport,
    "local": LocalTransport,
}


def make_transport(name: str) -> WeightTransport:
    """Create the transport `name`. Raises `WeightSyncError` with the nearest known name if it is unknown."""
    try:
        return TRANSPORTS[name]()
    except KeyError:
        hint = did_you_mean(name, TRANSPORTS)
        raise WeightSyncError(
            f"unknown weight transport {name!r}.{hint} Known: {', '.join(sorted(TRANSPORTS))}. "
            "Add yours to nemo_rl.models.weights.transports.TRANSPORTS."
        ) from None
