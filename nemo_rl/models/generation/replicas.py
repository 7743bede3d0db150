"""Places the replicas of a model, calls them, and replaces those that die.

A replica is one worker, or a tied group of workers that hold one copy of the model together.

::

    prompts ── consecutive parts ──► one replica each ──► results as they arrive
                                        │ the replica dies
                                        ├─ its node is alive: it restarts on its bundles, with the last weights
                                        ├─ its node is lost:  the other replicas do its work
                                        └─ its part is requested again, unless all of it has been received

The other replicas are not disturbed, and no position is yielded twice. Sampling depends only on the seed and the
prompt's position, so a failed replica does not change the completions for given weights.

Several threads may use the replicas: some generate while another updates the weights. Workers that run several streams
at a time would run an update at once, too. So the driver waits for the streams before it sends an update that is not in
flight, and before the other calls to all workers. New streams wait until those have returned.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from nemo_rl.distributed.futures import WORKER_DEATHS, Reference, death_among, get_all, worker_error
from nemo_rl.errors import NodeLostError
from nemo_rl.models.generation.results import select
from nemo_rl.models.weights.digest import check_digest
from nemo_rl.models.weights.interfaces import WeightOffer, WeightUpdate

if TYPE_CHECKING:
    from nemo_rl.distributed.worker_groups import RayWorkerGroup
    from nemo_rl.models.generation.interfaces import GenerationRequest, GenerationResult

logger = logging.getLogger(__name__)


def even_parts(total: int, num_parts: int) -> list[tuple[int, int]]:
    """Return consecutive (start, end) ranges of almost equal sizes. The last ones are empty if `num_parts > total`."""
    small, extra = divmod(total, num_parts)
    bounds, start = [], 0
    for part in range(num_parts):
        end = start + small + (part < extra)
        bounds.append((start, end))
        start = end
    return bounds


@dataclass
class _Part:
    """A part of a request that was sent to one replica.

    Attributes:
        replica, incarnation: The replica, and how often it had been restarted by then.
        start, end: Positions of the part's prompts in the whole request.
        pending: Calls whose results have not all been received: reference -> rank.
    """

    replica: int
    incarnation: int
    start: int
    end: int
    pending: dict[Reference, int]

    def take(self, ready: Reference, leader: int) -> tuple[list[int], GenerationResult] | None:
        """Take the result that has arrived. None: the end of a stream, or the copy of a rank that is not the leader.

        Raises one of `WORKER_DEATHS` for a dead worker, or the error that the worker raised.
        """
        is_leader = self.pending[ready] == leader
        if not isinstance(ready, ray.ObjectRefGenerator):
            del self.pending[ready]
            result = ray.get(ready)
            return (list(range(self.start, self.end)), result) if is_leader else None
        reference = next(ready, None)
        if reference is None:
            del self.pending[ready]
            return None
        piece: tuple[list[int], GenerationResult] = ray.get(reference)
        return piece if is_leader else None


class Replicas:
    """Calls the replicas of one model in a worker group; each replica is a tied group.

    Args:
        workers: The worker group.
        size: Workers of one replica. Ranks 0 to `size - 1` are the first replica.
        max_restarts: How many failed replicas may be restarted in total.
        runs_concurrently: Whether a worker runs several streams at a time, by `stream_concurrently`. Otherwise it runs
            all calls in the order in which they are sent.
    """

    def __init__(
        self, workers: RayWorkerGroup, *, size: int, max_restarts: int, runs_concurrently: bool = False
    ) -> None:
        assert size == 1 or not runs_concurrently, "the workers of a tied group must take the same steps"
        self.workers = workers
        self._size = size
        self._restarts_left = max_restarts
        # Live replica -> how often it has been restarted.
        self._incarnations = dict.fromkeys(range(workers.world_size // size), 0)
        self._update: WeightUpdate | WeightOffer | None = None
        self._reported_digest: str | None = None
        self._runs_concurrently = runs_concurrently
        # Concurrent streams that may still run, by the reference that is ready when the stream has ended.
        self._streams: dict[ray.ObjectRef, _Part] = {}
        self._changing = threading.RLock()  # held while weights are loaded, a replica is replaced or calls are sent

    def run(self, request: GenerationRequest, *, streamed: bool) -> Iterator[tuple[list[int], GenerationResult]]:
        """Send a request to the replicas, in even parts. The calls start at once.

        Args:
            request: The prompts and how to complete them.
            streamed: Let each worker yield prompts as their completions end, not its whole part at the end.

        Yields:
            Positions in the request and the completions of these prompts, each position once, in the order of arrival.

        Raises:
            WorkerError: A replica died and may not be restarted any more.
        """
        method = "generate"
        if streamed:
            method = "stream_concurrently" if self._runs_concurrently else "stream"
        return self._receive(request, method, self._send(request, method, 0, request.num_prompts))

    def update_weights(self, update: WeightUpdate | WeightOffer, *, in_flight: bool) -> str:
        """Load weights on every replica; returns the digest that the workers computed.

        Raises:
            WeightSyncError: A worker's digest differs from the sender's.
        """
        # The workers of a tied group must take the same steps, so their update comes between two calls.
        method = "update_weights_in_flight" if in_flight and self._size == 1 else "update_weights"
        with self._changing:
            if not in_flight:
                self._await_streams()
            self._update, self._reported_digest = update, None
            self._load(method, self._incarnations)
            assert self._reported_digest is not None, "no worker has loaded the weights"
            return self._reported_digest

    def _load(self, method: str, incarnations: Mapping[int, int]) -> None:
        """Load the weights on these replicas. Replace the dead ones, and load the weights on them, too."""
        assert self._update is not None
        if isinstance(self._update, WeightUpdate):
            dead = self._load_published(self._update, method, incarnations)
        else:
            dead = self._load_streamed(self._update, method, incarnations)
        for replica, error in dead.items():
            self._replace(replica, incarnations[replica], error)

    def _load_published(self, update: WeightUpdate, method: str, replicas: Iterable[int]) -> dict[int, RayError]:
        """Load published weights; returns the dead replicas with their errors."""
        dead: dict[int, RayError] = {}
        shared = ray.put(update)
        calls = [(replica, self._call(replica, method, update=shared)) for replica in replicas]
        for replica, references in calls:
            try:
                # Wait for all ranks at once: if one of a tied group is dead, the others wait for it.
                digests = dict(zip(references.values(), get_all(references), strict=True))
            except WORKER_DEATHS as error:
                dead[replica] = error
            else:
                self._check_digests(update.version, update.digest, digests)
        return dead

    def _load_streamed(self, offer: WeightOffer, method: str, replicas: Iterable[int]) -> dict[int, RayError]:
        """Load weights while the policy sends them; returns the dead replicas with their errors."""
        ranks = [rank for replica in replicas for rank in self._ranks(replica)]
        bundles = self.workers.bundles
        streams = offer.open({rank: bundles[rank] for rank in ranks})
        call = self.workers.run_single_worker_single_data
        rank_of = {call(method, worker_idx=rank, update=streams[rank]): rank for rank in ranks}
        waiting = {*rank_of, *offer.references}
        digests: dict[int, str] = {}
        dead: dict[int, RayError] = {}
        failed: dict[int, RayError] = {}
        while waiting:
            [ready], _ = ray.wait(list(waiting), num_returns=1)
            waiting.discard(ready)
            rank = rank_of.get(ready)
            try:
                digest = ray.get(ready)
                if rank is not None:
                    digests[rank] = digest
            except RayError as error:
                if rank is None:
                    break  # the sender failed: `finish` raises its error
                if not isinstance(error, WORKER_DEATHS):
                    failed[rank] = error  # if the stream ended too early, `finish` raises the sender's error instead
                    offer.leave(streams[rank])
                    continue
                # The other ranks of its tied group would wait for the dead one forever, so they are killed, too.
                replica = rank // self._size
                dead.setdefault(replica, error)
                tied_ranks = self._ranks(replica)
                self.workers.kill_workers(tied_ranks)
                for tied_rank in tied_ranks:
                    offer.leave(streams[tied_rank])
        sent_digest = offer.finish()
        for rank, failure in failed.items():
            if rank // self._size not in dead:
                raise failure
        alive = {rank: digest for rank, digest in digests.items() if rank // self._size not in dead}
        self._check_digests(offer.version, sent_digest, alive)
        return dead

    def _check_digests(self, version: int, expected: str, digests: Mapping[int, str]) -> None:
        """Compare the digests that workers reported, by rank, with the sender's."""
        for rank, digest in digests.items():
            where = self.workers.describe_worker(rank)
            check_digest(version=version, expected=expected, found=digest, where=where)
            self._reported_digest = digest

    def call_all(self, method: str, *, on_replaced: bool = True, **kwargs: Any) -> dict[int, Any]:
        """Call a method on every live worker, and replace the workers that turn out to be dead.

        Args:
            method: Name of the method.
            on_replaced: Also call it on the workers that replace dead ones.
            kwargs: Arguments of the method.

        Returns:
            Each worker's return value, by rank.
        """
        results: dict[int, Any] = {}
        with self._changing:
            self._await_streams()
            calls = [(replica, self._call(replica, method, **kwargs)) for replica in self._incarnations]
            for replica, references in calls:
                while True:
                    incarnation = self._incarnations[replica]
                    try:
                        results.update(zip(references.values(), get_all(references), strict=True))
                    except WORKER_DEATHS as error:
                        self._replace(replica, incarnation, error)
                        if on_replaced and replica in self._incarnations:
                            references = self._call(replica, method, **kwargs)
                            continue
                    break
        return results

    def attestation(self) -> list[dict[str, Any]]:
        """Return one record per live worker: how it was started, and what it reports."""
        reported = self.call_all("attestation")
        launched = self.workers.attestation
        return [launched[rank] | reported[rank] for rank in sorted(reported)]

    def _ranks(self, replica: int) -> range:
        return range(replica * self._size, (replica + 1) * self._size)

    def _call(self, replica: int, method: str, **kwargs: Any) -> dict[Reference, int]:
        call = self.workers.run_single_worker_single_data
        return {call(method, worker_idx=rank, **kwargs): rank for rank in self._ranks(replica)}

    def _send(self, request: GenerationRequest, method: str, start: int, end: int) -> list[_Part]:
        """Send the prompts from `start` to `end` to the replicas, in even parts. The least busy ones come first."""
        parts = []
        with self._changing:
            self._await_streams(timeout_s=0.0)
            busy = Counter[int]()
            for stream in self._streams.values():
                busy[stream.replica] += stream.end - stream.start
            replicas = sorted(self._incarnations, key=busy.__getitem__)
            for replica, (first, last) in zip(replicas, even_parts(end - start, len(replicas)), strict=True):
                if first == last and first > 0:
                    continue
                part: Any = request.part(start + first, start + last)
                if self._size > 1:
                    part = ray.put(part)
                references = self._call(replica, method, request=part)
                sent = _Part(replica, self._incarnations[replica], start + first, start + last, references)
                parts.append(sent)
                for reference in references if self._runs_concurrently else ():
                    if isinstance(reference, ray.ObjectRefGenerator):
                        self._streams[reference.completed()] = sent
        return parts

    def _await_streams(self, timeout_s: float | None = None) -> None:
        """Wait until all streams have ended, and forget those that have. Those of a dead replica have ended."""
        if self._streams:
            waiting = list(self._streams)
            ended, _ = ray.wait(waiting, num_returns=len(waiting), timeout=timeout_s, fetch_local=False)
            for reference in ended:
                del self._streams[reference]

    def _receive(
        self, request: GenerationRequest, method: str, parts: list[_Part]
    ) -> Iterator[tuple[list[int], GenerationResult]]:
        """Yield results as they arrive. Send the parts of dead replicas again."""
        seen: set[int] = set()
        while parts:
            part_of = {reference: part for part in parts for reference in part.pending}
            [ready], _ = ray.wait(list(part_of), num_returns=1, fetch_local=False)
            part = part_of[ready]
            try:
                piece = part.take(ready, leader=self._ranks(part.replica)[0])
            except (*WORKER_DEATHS, ObjectLostError, RayTaskError) as error:
                death = death_among(part.pending) if isinstance(error, RayTaskError) else error
                if death is None:
                    raise
                parts.remove(part)
                if not isinstance(death, ObjectLostError):  # a lost result is requested again; no replica has died
                    self._replace(part.replica, part.incarnation, death)
                if not seen.issuperset(range(part.start, part.end)):
                    parts += self._send(request, method, part.start, part.end)
                continue
            if not part.pending:
                parts.remove(part)
            if piece is not None:
                yield from _unseen(*piece, seen, request.num_generations)

    def _replace(self, replica: int, incarnation: int, error: RayError) -> None:
        """Restart a dead replica, or remove it if its node is lost. Raises `WorkerError` if no restarts are left."""
        with self._changing:
            if self._incarnations.get(replica) != incarnation:
                return  # another thread has replaced it already
            ranks = self._ranks(replica)
            death = worker_error(self.workers, error, ranks)
            try:
                if not self._restarts_left:
                    self.workers.check_nodes_alive(ranks)
                    raise death from error
                self.workers.replace_workers(ranks)
            except NodeLostError as lost:
                del self._incarnations[replica]
                if not self._incarnations:
                    raise death from lost
                logger.warning(
                    "%s. %s The other %d replicas continue without it.", death, lost, len(self._incarnations)
                )
                return
            self._restarts_left -= 1
            self._incarnations[replica] += 1
            logger.warning("%s. It has been restarted; %d more restarts are allowed.", death, self._restarts_left)
            if self._update is not None:
                self._load("update_weights", {replica: self._incarnations[replica]})


def _unseen(
    positions: list[int], piece: GenerationResult, seen: set[int], num_generations: int
) -> Iterator[tuple[list[int], GenerationResult]]:
    """Yield the prompts of a piece that have not been yielded before, if any, and add them to `seen`."""
    new = [index for index, position in enumerate(positions) if position not in seen]
    seen.update(positions)
    if len(new) == len(positions):
        yield positions, piece
    elif new:
        rows = [index * num_generations + g for index in new for g in range(num_generations)]
        yield [positions[index] for index in new], select(piece, rows)
