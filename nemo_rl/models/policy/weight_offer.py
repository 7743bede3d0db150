"""The driver's side of a stream of weights: generation asks for them, and the policy's workers send them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from nemo_rl.distributed.futures import Reference
from nemo_rl.distributed.worker_groups import RayWorkerGroup
from nemo_rl.errors import WeightSyncError
from nemo_rl.models.weights.interfaces import WeightOffer, WeightStream
from nemo_rl.models.weights.stream import connect


class PolicyWeights(WeightOffer):
    """The current weights of a policy.

    Args:
        workers: of the policy.
        endpoint: address and key of the sending worker.
        transport: name of the transport.
        version: of the weights.
        dtype: that they are sent in.
        next_stream: numbers the streams of a sender.
    """

    def __init__(
        self,
        workers: RayWorkerGroup,
        endpoint: tuple[str, bytes],
        transport: str,
        version: int,
        dtype: str,
        next_stream: Callable[[], int],
    ) -> None:
        self.version = version
        self._workers = workers
        self._endpoint = endpoint
        self._transport = transport
        self._dtype = dtype
        self._next_stream = next_stream
        self._sending: list[Reference] = []
        self._digest: str | None = None
        self._is_over = False

    @property
    def digest(self) -> str:
        if self._digest is None:
            raise WeightSyncError(f"weights of version {self.version} have not been sent yet")
        return self._digest

    @property
    def references(self) -> list[Reference]:
        return self._sending

    def open(self, receivers: Sequence[int]) -> list[WeightStream]:
        if self._is_over:
            raise WeightSyncError(f"the policy does not have the weights of version {self.version} any more")
        stream = self._next_stream()
        self._sending = self._workers.run_all_workers_single_data(
            "send_weights", version=self.version, dtype=self._dtype, stream=stream, receivers=list(receivers)
        )
        address, key = self._endpoint
        return [WeightStream(self.version, self._transport, address, key, stream, receiver) for receiver in receivers]

    def leave(self, stream: WeightStream) -> None:
        with contextlib.suppress(WeightSyncError):  # the sender is dead itself, and `finish` says so
            connect(stream, leaves=True).close()

    def finish(self) -> str:
        sending, self._sending = self._sending, []
        digests = self._workers.get_all_worker_results(sending)
        self._digest = next(digest for digest in digests if digest is not None)
        return self._digest

    def expire(self) -> None:
        """The policy is about to change its weights."""
        self._is_over = True
