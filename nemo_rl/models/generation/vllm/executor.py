"""One model over the workers of a tied group: each runs its own engine in step with the others.

::

    driver ── the same prompts to every worker of the group ──►  rank 0: engine, scheduler, 1/n of every matrix ──┐
                                                                 rank 1: engine, scheduler, 1/n of every matrix ──┤
                                                                  all-reduce within each layer, all-gather of logits

The schedulers see the same requests in the same order and every rank draws the same tokens from the same logits, so
the engines need not speak to each other about anything else. vLLM calls this an external launcher; its own finds its
place by variables of the whole worker group, of which a tied group is only a part, so it is told here.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher


@dataclass(frozen=True)
class TiedGroup:
    """A worker's place in its tied group: how many ranks, which one, and where rank 0 listens."""

    size: int
    rank: int
    address: str
    port: int


def tied_executor(group: TiedGroup) -> type[ExecutorWithExternalLauncher]:
    """The executor class of one worker."""

    class TiedExecutor(ExecutorWithExternalLauncher):
        def _distributed_args(self) -> tuple[str, int, int]:
            # Where to meet, rank, and device: Ray shows each worker only its own GPU.
            return f"tcp://{group.address}:{group.port}", group.rank, 0

    return TiedExecutor
