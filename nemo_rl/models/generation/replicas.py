"""Calls to the replicas of a model, and what happens when one of them dies.

::

    prompts ── consecutive parts ──► one replica each ──► results as they come
                                        │ dies
                                        ├─ its node lives:   it starts anew on its bundles, with the last weights
                                        ├─ its node is gone: the others do its work
                                        └─ its part is asked for again, unless it had handed over all of it

The other replicas are not disturbed, and nothing is handed over twice. A draw depends on the seed and the position
only: with the same weights completions are those that there would have been without the death. Two threads may call:
one generates while another brings new weights.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectLostError, RayError

from nemo_rl.distributed.futures import WORKER_DEATHS, Reference, worker_error
from nemo_rl.errors import NodeLostError
from nemo_rl.models.generation.replica_layout import even_parts
from nemo_rl.models.generation.results import select
from nemo_rl.models.weights.digest import check_digest
from nemo_rl.models.weights.interfaces import WeightOffer, WeightUpdate

if TYPE_CHECKING:
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.distributed.worker_groups import RayWorkerGroup
    from nemo_rl.models.generation.interfaces import GenerationResult

logger = logging.getLogger(__name__)


@dataclass
class _Part:
    """What one replica was asked for.

    Attributes:
        replica, life: who was asked, and in which of its lives.
        start, end: positions of its prompts in the whole call.
        pending: what its workers have not returned yet: reference -> rank.
    """

    replica: int
    life: int
    start: int
    end: int
    pending: dict[Reference, int]

    def take(self, ready: Reference, leader: int) -> tuple[list[int], GenerationResult] | None:
        """What has come, or None: the end of a stream, or the same again from another rank of the replica.

        Raises one of `WORKER_DEATHS` for a dead worker, and what the worker raised.
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
    """The replicas of one model in a worker group; each is a tied group of its own.

    Args:
        workers: the group.
        size: workers of one replica: ranks 0 to size - 1 are the first.
        max_restarts: how many deaths of replicas are made good.
    """

    def __init__(self, workers: RayWorkerGroup, *, size: int, max_restarts: int) -> None:
        self.workers = workers
        self._size = size
        self._restarts_left = max_restarts
        self._lives = dict.fromkeys(range(workers.world_size // size), 0)  # of those that there are
        self._update: WeightUpdate | WeightOffer | None = None
        self._changing = threading.RLock()  # held while weights are loaded or a replica is replaced

    def run(
        self, method: str, prompts: BatchedDataDict, how: Mapping[str, Any]
    ) -> Iterator[tuple[list[int], GenerationResult]]:
        """Call `method` ("generate" or "stream") with `prompts` spread over the replicas; the calls go out at once.

        Yields:
            Positions in `prompts` and the completions of these prompts, each position once, in the order they come.

        Raises:
            WorkerError: a replica died and may not be replaced any more.
        """
        send = functools.partial(self._send, method, prompts, how)
        return self._pieces(send(0, len(prompts["input_lengths"])), send, how["num_generations"])

    def update_weights(self, update: WeightUpdate | WeightOffer, *, in_flight: bool) -> str:
        """Load weights on every replica. Raises `WeightSyncError` when one has not got what was sent."""
        with self._changing:
            self._update = update
            # Workers that hold a model together have to take the same steps, so with them it comes between two calls.
            self._load("update_weights_in_flight" if in_flight and self._size == 1 else "update_weights", self._lives)
        return update.digest

    def _load(self, method: str, lives: Mapping[int, int]) -> None:
        """Load the weights on replicas; those that turn out to be dead are replaced, and get them too."""
        assert self._update is not None
        if isinstance(self._update, WeightUpdate):
            dead = self._load_published(self._update, method, lives)
        else:
            dead = self._load_streamed(self._update, method, lives)
        for replica, error in dead.items():
            self._replace(replica, lives[replica], error)

    def _load_published(self, update: WeightUpdate, method: str, lives: Mapping[int, int]) -> dict[int, RayError]:
        dead: dict[int, RayError] = {}
        shared = ray.put(update)
        calls = [(replica, self._call(replica, method, update=shared)) for replica in lives]
        for replica, references in calls:
            try:
                # All at once: of ranks that hold a model together, the others wait for one that is dead.
                digests = dict(zip(references.values(), ray.get(list(references)), strict=True))
            except WORKER_DEATHS as error:
                dead[replica] = error
            else:
                self._check_digests(update.version, update.digest, digests)
        return dead

    def _load_streamed(self, offer: WeightOffer, method: str, lives: Mapping[int, int]) -> dict[int, RayError]:
        ranks = [rank for replica in lives for rank in self._ranks(replica)]
        bundles = self.workers.bundles
        streams = offer.open({rank: bundles[rank] for rank in ranks})
        call = self.workers.run_single_worker_single_data
        rank_of = {call(method, worker_idx=rank, update=streams[rank]): rank for rank in ranks}
        waiting = {*rank_of, *offer.references}
        digests: dict[int, str] = {}
        dead: dict[int, RayError] = {}
        failed: RayError | None = None
        while waiting:
            [ready], _ = ray.wait(list(waiting), num_returns=1)
            waiting.discard(ready)
            rank = rank_of.get(ready)
            try:
                answer = ray.get(ready)
                if rank is not None:
                    digests[rank] = answer
            except RayError as error:
                if rank is None:
                    break  # the sender: `finish` raises its error
                if not isinstance(error, WORKER_DEATHS):
                    failed = error  # if because the stream ended too early, `finish` says why it did
                    offer.leave(streams[rank])
                    continue
                # Who holds a model together with it waits for it. Nobody waits for them once they are dead too.
                replica = rank // self._size
                dead.setdefault(replica, error)
                mates = self._ranks(replica)
                self.workers.kill_workers(mates)
                for mate in mates:
                    offer.leave(streams[mate])
        digest = offer.finish()
        if failed is not None:
            raise failed
        self._check_digests(
            offer.version, digest, {rank: own for rank, own in digests.items() if rank // self._size not in dead}
        )
        return dead

    def _check_digests(self, version: int, expected: str, digests: Mapping[int, str]) -> None:
        for rank, digest in digests.items():
            where = self.workers.describe_worker(rank)
            check_digest(version=version, expected=expected, found=digest, where=where)

    def call_all(self, method: str, *, on_new: bool = True, **kwargs: Any) -> dict[int, Any]:
        """Call a method on every worker there is, and replace those that turn out to be dead.

        Args:
            on_new: call it on workers that were replaced, too.

        Returns:
            What each worker returned, by rank.
        """
        answers: dict[int, Any] = {}
        with self._changing:
            for replica, life, references in self._call_each(method, **kwargs):
                while True:
                    try:
                        answers.update(zip(references.values(), ray.get(list(references)), strict=True))
                    except WORKER_DEATHS as error:
                        self._replace(replica, life, error)
                        if on_new and replica in self._lives:
                            life, references = self._lives[replica], self._call(replica, method, **kwargs)
                            continue
                    break
        return answers

    def attestation(self) -> list[dict[str, Any]]:
        """Of every worker there is: how it was started, and what it reports itself."""
        own = self.call_all("attestation")
        launched = self.workers.attestation
        return [launched[rank] | own[rank] for rank in sorted(own)]

    def _call_each(self, method: str, **kwargs: Any) -> list[tuple[int, int, dict[Reference, int]]]:
        """Call a method on every worker: replica, its life, and the references with their ranks."""
        return [(replica, life, self._call(replica, method, **kwargs)) for replica, life in self._lives.items()]

    def _ranks(self, replica: int) -> range:
        return range(replica * self._size, (replica + 1) * self._size)

    def _call(self, replica: int, method: str, **kwargs: Any) -> dict[Reference, int]:
        call = self.workers.run_single_worker_single_data
        return {call(method, worker_idx=rank, **kwargs): rank for rank in self._ranks(replica)}

    def _send(self, method: str, prompts: BatchedDataDict, how: Mapping[str, Any], start: int, end: int) -> list[_Part]:
        """Ask the replicas for the prompts from `start` to `end`, in even parts."""
        parts = []
        with self._changing:
            for (replica, life), (first, last) in zip(self._lives.items(), even_parts(end - start, len(self._lives))):
                if first == last and first > 0:
                    continue
                rows = slice(start + first, start + last)
                own: Any = {key: prompts[key][rows] for key in ("input_ids", "input_lengths")}
                if self._size > 1:
                    own = ray.put(own)
                references = self._call(replica, method, prompts=own, first_prompt=rows.start, **how)
                parts.append(_Part(replica, life, rows.start, rows.stop, references))
        return parts

    def _pieces(
        self, parts: list[_Part], send: Callable[[int, int], list[_Part]], num_generations: int
    ) -> Iterator[tuple[list[int], GenerationResult]]:
        seen: set[int] = set()
        while parts:
            part_of = {reference: part for part in parts for reference in part.pending}
            [ready], _ = ray.wait(list(part_of), num_returns=1, fetch_local=False)
            part = part_of[ready]
            try:
                piece = part.take(ready, leader=self._ranks(part.replica)[0])
            except (*WORKER_DEATHS, ObjectLostError) as error:
                parts.remove(part)
                if not isinstance(error, ObjectLostError):  # a result that was ready, on a node that is gone
                    self._replace(part.replica, part.life, error)
                if not seen.issuperset(range(part.start, part.end)):
                    parts += send(part.start, part.end)
                continue
            if not part.pending:
                parts.remove(part)
            if piece is not None:
                yield from _unseen(*piece, seen, num_generations)

    def _replace(self, replica: int, life: int, error: RayError) -> None:
        """Bring a dead replica back, or do without it. Raises the `WorkerError` when that has been done too often."""
        with self._changing:
            if self._lives.get(replica) != life:
                return  # another thread has seen its death too
            ranks = self._ranks(replica)
            death = worker_error(self.workers, error, ranks)
            try:
                if not self._restarts_left:
                    self.workers.check_nodes_alive(ranks)
                    raise death from error
                self.workers.replace_workers(ranks)
            except NodeLostError as lost:
                del self._lives[replica]
                if not self._lives:
                    raise death from lost
                logger.warning("%s. %s The other %d replicas go on without it.", death, lost, len(self._lives))
                return
            self._restarts_left -= 1
            self._lives[replica] += 1
            logger.warning("%s. It was started anew; that may happen %d more times.", death, self._restarts_left)
            if self._update is not None:
                self._load("update_weights", {replica: self._lives[replica]})


def _unseen(
    positions: list[int], piece: GenerationResult, seen: set[int], num_generations: int
) -> Iterator[tuple[list[int], GenerationResult]]:
    """What of a piece has not been handed over yet, if anything; from now on it has been."""
    new = [index for index, position in enumerate(positions) if position not in seen]
    seen.update(positions)
    if len(new) == len(positions):
        yield positions, piece
    elif new:
        rows = [index * num_generations + g for index in new for g in range(num_generations)]
        yield [positions[index] for index in new], select(piece, rows)
