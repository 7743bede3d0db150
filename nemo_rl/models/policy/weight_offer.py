"""The driver's side of weight streams: starts the policy workers' sending calls when generation requests weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from nemo_rl.distributed.futures import Reference
from nemo_rl.distributed.worker_groups import RayWorkerGroup
from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.interfaces import WeightOffer, WeightStream
from nemo_rl.models.weights.routes import Place, assign_senders
from nemo_rl.models.weights.stream import Endpoint, connect
from nemo_rl.models.weights.transports import make_transport

if TYPE_CHECKING:
    from nemo_rl.distributed.cluster.bundles import Bundle


class WeightSenders:
    """Starts sending calls on policy workers: on rank 0, or on all ranks.

    Args:
        workers: the worker group of the policy.
        transport: name of the transport of streams.
        spans_nodes: whether a receiver, or the driver, may be on another node.
    """

    def __init__(self, workers: RayWorkerGroup, transport: str, *, spans_nodes: bool) -> None:
        self.workers = workers
        self.transport = transport
        bundles = workers.bundles if make_transport(transport).every_rank_sends else workers.bundles[:1]
        self._places = [Place.of(bundle) for bundle in bundles]
        calls = [
            workers.run_single_worker_single_data(
                "weight_endpoint", worker_idx=rank, host=bundle.address if spans_nodes else None
            )
            for rank, bundle in enumerate(bundles)
        ]
        self._endpoints: list[Endpoint] = workers.get_all_worker_results(calls)
        self._num_streams = 0

    def send(
        self, receivers: Mapping[int, Bundle], version: int, dtype: str
    ) -> tuple[list[Reference], dict[int, WeightStream]]:
        """Start a stream; returns the sending calls, and what each receiver needs to join."""
        self._num_streams += 1
        receivers_by_rank: list[list[int]] = [[] for _ in range(self.workers.world_size)]
        streams: dict[int, WeightStream] = {}
        ranks = assign_senders(self._places, [Place.of(bundle) for bundle in receivers.values()])
        for receiver, rank in zip(receivers, ranks, strict=True):
            receivers_by_rank[rank].append(receiver)
            address, key = self._endpoints[rank]
            streams[receiver] = WeightStream(version, self.transport, address, key, self._num_streams, receiver)
        calls = self.workers.run_all_workers_single_data(
            "send_weights", version=version, dtype=dtype, stream=self._num_streams, receivers=receivers_by_rank
        )
        return calls, streams


class PolicyWeights(WeightOffer):
    """Offers the current weights of a policy; see `WeightOffer`.

    Args:
        senders: returns the workers that send.
        version: version of the weights.
        dtype: dtype that the weights are cast to.
    """

    def __init__(self, senders: Callable[[], WeightSenders], version: int, dtype: str) -> None:
        self.version = version
        self._senders = senders
        self._dtype = dtype
        self._sending: list[Reference] = []
        self._digest: str | None = None
        self._is_expired = False

    @property
    def digest(self) -> str:
        if self._digest is None:
            raise WeightSyncError(f"weights of version {self.version} have not been sent yet")
        return self._digest

    @property
    def references(self) -> list[Reference]:
        return self._sending

    def open(self, receivers: Mapping[int, Bundle]) -> dict[int, WeightStream]:
        if self._is_expired:
            raise WeightSyncError(f"the policy no longer has the weights of version {self.version}")
        self._sending, streams = self._senders().send(receivers, self.version, self._dtype)
        return streams

    def leave(self, stream: WeightStream) -> None:
        with contextlib.suppress(WeightSyncError):  # the sender has ended, too; `finish` raises its error
            connect(stream, leaves=True).close()

    def finish(self) -> str:
        sending, self._sending = self._sending, []
        digests = set(self._senders().workers.get_all_worker_results(sending)) - {None}
        if len(digests) != 1:
            raise WeightSyncError(
                f"policy workers hold different weights of version {self.version}: digests {sorted(digests)}. "
                "Restart the job from its last checkpoint."
            )
        [self._digest] = digests
        assert self._digest is not None
        return self._digest

    def expire(self) -> None:
        """Refuse new streams, because the policy is about to change its weights."""
        self._is_expired = True
