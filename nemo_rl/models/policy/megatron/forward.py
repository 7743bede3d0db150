"""The forward and backward passes of micro-batches through the pipeline's stages.

::

    micro-batch ─► tokens [R, C], padded to a multiple of the ranks ─► stages ─► logits of this rank's vocabulary
                                                                                   │ (last stage)
    [b, T] log-probabilities ◄── scattered ◄── of the needed columns ◄─────────────┘

megatron-core's schedule moves micro-batches through the stages (one forward pass, one backward pass in turn).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.policy.megatron.attention import PackedSequences, context_order
from nemo_rl.models.policy.megatron.config import MegatronOptions
from nemo_rl.models.policy.megatron.logprobs import vocabulary_parallel_logprobs
from nemo_rl.models.policy.megatron.moe import Router
from nemo_rl.models.policy.megatron.parallel import Grid
from nemo_rl.models.policy.microbatching import ModelInputs, model_inputs
from nemo_rl.models.routed_experts import ROUTED_EXPERTS, known_experts


@dataclass(frozen=True)
class _Prepared:
    """Inputs of one forward pass.

    Attributes:
        inputs: the inputs for any backend.
        input_ids: [R, C] int64: the padded ids of `inputs`; under context parallelism, this rank's part of them.
        width: C over all context-parallel ranks.
        columns: the K positions whose logits are needed.
        packed: bounds of the sequences if they are packed.
        experts: [C * R (this rank's part), L * K] experts that the routers take; None: they choose.
    """

    inputs: ModelInputs
    input_ids: torch.Tensor
    width: int
    columns: slice | torch.Tensor
    packed: PackedSequences | None
    experts: torch.Tensor | None


class PipelineForward:
    """Runs micro-batches through a model and its pipeline.

    Args:
        model: this rank's part of the model, wrapped for training or not.
        grid: this rank's place.
        options: the parallel sizes.
        vocabulary: size of the model's vocabulary, without padding.
        packed: lay the sequences of a micro-batch end to end.
        temperature: of the log-probabilities, which are those of softmax(logits / temperature).
    """

    def __init__(
        self,
        model: Any,
        grid: Grid,
        options: MegatronOptions,
        vocabulary: int,
        *,
        packed: bool,
        temperature: float,
    ) -> None:
        self._model = model
        self._grid = grid
        self._vocabulary = vocabulary
        self._packed = packed
        self._temperature = temperature
        self._routers = [module for module in model.modules() if isinstance(module, Router)]
        self._sequence_parallel = options.sequence_parallel
        self._split_sequence = options.sequence_parallel or options.context_parallel_size > 1
        self._multiple = (options.tensor_parallel_size if options.sequence_parallel else 1) * (
            2 * options.context_parallel_size if options.context_parallel_size > 1 else 1
        )

    def train(
        self,
        parts: Iterable[BatchedDataDict],
        loss: Callable[[torch.Tensor, BatchedDataDict], torch.Tensor],
    ) -> None:
        """Run forward and backward passes; then every gradient is the sum over micro-batches and ranks. A collective.

        Args:
            parts: micro-batches, on any device.
            loss: computes the loss from the [b, T] log-probabilities and the micro-batch. It is called on the last
                stage, once per micro-batch, in order.
        """

        def finish(prepared: _Prepared, part: BatchedDataDict, logits: torch.Tensor) -> tuple[torch.Tensor, Any, None]:
            value = loss(self._logprobs(prepared, logits), part)
            return value, torch.zeros((), dtype=torch.int, device=logits.device), None

        self._run(list(parts), finish, only_loss_tokens=True, forward_only=False)

    def logprobs(self, parts: Iterable[BatchedDataDict]) -> list[torch.Tensor]:
        """Return the [b, T] float32 log-probabilities of each micro-batch on the last stage, nothing on other stages.

        A collective.
        """

        def collect(
            prepared: _Prepared, part: BatchedDataDict, logits: torch.Tensor, non_loss_data: bool
        ) -> torch.Tensor:
            return self._logprobs(prepared, logits).cpu()

        with torch.no_grad():
            return self._run(list(parts), collect, only_loss_tokens=False, forward_only=True)

    def _run(
        self,
        parts: Sequence[BatchedDataDict],
        finish: Callable[..., Any],
        *,
        only_loss_tokens: bool,
        forward_only: bool,
    ) -> list[Any]:
        def step(iterator: Iterator[BatchedDataDict], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            part = next(iterator)
            prepared = self._prepare(part, only_loss_tokens)
            columns = None if self._split_sequence else prepared.columns
            for router in self._routers:
                router.use(prepared.experts)
            output = model(prepared.input_ids, packed=prepared.packed, columns=columns)
            return output, partial(finish, prepared, part)

        device = self._grid.world.device
        run = get_forward_backward_func()
        # Stages communicate the shapes, so the values of the two sizes below are not used.
        results: list[Any] = run(
            forward_step_func=step,
            data_iterator=(part.to(device) for part in parts),
            model=[self._model],
            num_microbatches=len(parts),
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return results

    def _prepare(self, part: BatchedDataDict, only_loss_tokens: bool) -> _Prepared:
        inputs = model_inputs(part, packed=self._packed, only_loss_tokens=only_loss_tokens)
        ids, kept = inputs.input_ids, inputs.logits_to_keep
        columns = slice(ids.shape[1] - kept, ids.shape[1]) if isinstance(kept, int) else kept
        padding = -ids.shape[1] % self._multiple
        packed = None
        if inputs.position_ids is not None:
            starts = (inputs.position_ids[0] == 0).nonzero().view(-1).tolist()
            ends = [*starts[1:], ids.shape[1]]
            lengths = [end - start for start, end in zip(starts, ends)] + [padding] * bool(padding)
            packed = PackedSequences.of(lengths, ids.device)
        ids = F.pad(ids, (0, padding))
        experts = part.get(ROUTED_EXPERTS)
        if experts is not None:
            experts = inputs.at_inputs(known_experts(experts, part["input_lengths"]))
            experts = F.pad(experts, (0, 0, 0, padding), value=-1).transpose(0, 1)
        width, context = ids.shape[1], self._grid.context
        if context.size() > 1:
            order = context_order(width, context.size()).chunk(context.size())[context.rank()].to(ids.device)
            ids = ids[:, order]
            experts = None if experts is None else experts[order]
        if experts is not None:
            if self._sequence_parallel:
                experts = experts.chunk(self._grid.tensor.size())[self._grid.tensor.rank()]
            experts = experts.flatten(0, 1)
        return _Prepared(inputs, ids, width, columns, packed, experts)

    def _logprobs(self, prepared: _Prepared, logits: torch.Tensor) -> torch.Tensor:
        """Compute [b, T] log-probabilities from the last stage's logits [R, K or C, V / ranks]."""
        inputs = prepared.inputs
        if self._grid.context.size() > 1:
            return inputs.scatter(self._context_parallel_logprobs(prepared, logits))
        if self._split_sequence:
            logits = logits[:, prepared.columns]
        return inputs.scatter(self._token_logprobs(logits.flatten(0, 1), inputs.tokens))

    def _token_logprobs(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return vocabulary_parallel_logprobs(logits, tokens, self._vocabulary, self._grid.tensor, self._temperature)

    def _context_parallel_logprobs(self, prepared: _Prepared, logits: torch.Tensor) -> torch.Tensor:
        """Compute [R * K] log-probabilities: each rank computes those of its positions, and all are gathered."""
        context, (rows, num_positions) = self._grid.context, prepared.input_ids.shape
        order = context_order(prepared.width, context.size()).to(logits.device)
        tokens = prepared.input_ids.new_zeros(rows, prepared.width)
        tokens[:, prepared.columns] = prepared.inputs.tokens.view(rows, -1)
        local_tokens = tokens[:, order.chunk(context.size())[context.rank()]]
        logprobs = self._token_logprobs(logits.flatten(0, 1), local_tokens.flatten()).view(rows, num_positions)
        # Every rank computes the same loss from all log-probabilities, so each keeps the gradient of its part.
        gathered = gather_from_sequence_parallel_region(
            logprobs.t().contiguous(), tensor_parallel_output_grad=False, group=context
        )
        in_order = torch.empty_like(gathered).index_copy(0, order, gathered).t()
        return in_order[:, prepared.columns].flatten()
