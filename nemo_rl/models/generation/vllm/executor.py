"""One model over the workers of a tied group: each worker runs its own engine in step with the others.

::

    driver ── the same prompts to every worker of the group ──►  rank 0: engine, scheduler, 1/n of every matrix ──┐
                                                                 rank 1: engine, scheduler, 1/n of every matrix ──┤
                                                                  all-reduce within each layer, all-gather of logits

The schedulers see the same requests in the same order, and every rank draws the same tokens from the same logits. So
the engines need no other communication. vLLM calls this an external launcher. Its own executor takes its rank from
variables of the whole worker group, of which a tied group is only a part; the executor here gets the rank from
`TiedGroup`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher


@dataclass(frozen=True)
class TiedGroup:
    """A worker's place in its tied group.

    Attributes:
        size: Number of ranks.
        rank: This worker's rank.
        address, port: Where rank 0 listens.
    """

    size: int
    rank: int
    address: str
    port: int


def tied_executor(group: TiedGroup) -> type[ExecutorWithExternalLauncher]:
    """Return the executor class of one worker."""

    class TiedExecutor(ExecutorWithExternalLauncher):
        def _distributed_args(self) -> tuple[str, int, int]:
            # Rendezvous address, rank, and device: Ray makes only its own GPU visible to each worker.
            return f"tcp://{group.address}:{group.port}", group.rank, 0

    return TiedExecutor
