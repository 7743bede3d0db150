"""The forward pass from a micro-batch to the log-probabilities of its tokens."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from nemo_rl.distributed.batched_data_dict import BatchedDataDict, SlicedDataDict
from nemo_rl.errors import ModelError
from nemo_rl.models.policy.cpu_kernels import ATTENTION as CPU_ATTENTION
from nemo_rl.models.policy.microbatching import MicrobatchLoss, ModelInputs, model_inputs
from nemo_rl.models.policy.parallel_model import ParallelModel
from nemo_rl.models.policy.row_parts import row_parts
from nemo_rl.models.routed_experts import ROUTED_EXPERTS, ExpertReplay, known_experts
from nemo_rl.models.row_threads import RowThreads, map_rows

logger = logging.getLogger(__name__)

# Logits held in float32 at a time: 2**24 elements are 64 MiB.
CHUNK_ELEMENTS = 2**24
# Packed and padded passes of one model differ by rounding only. Attending to another sequence changes far more.
_PACKING_TOLERANCE = {True: 0.1, False: 1e-3}  # in nats, by whether matrices are multiplied in bfloat16


class LogprobForward:
    """Computes log-probabilities of micro-batches under a model.

    Args:
        model: the model; the pass uses its precision and its sharding.
        packed: lay the sequences of a micro-batch end to end.
        temperature: of the log-probabilities, which are those of softmax(logits / temperature).
        threads: divide the rows of a micro-batch over these threads; see `row_parts.threads_for`.

    Raises:
        ModelError: with `packed`, if the model lets packed sequences attend to each other.
    """

    def __init__(
        self, model: ParallelModel, *, packed: bool, temperature: float, threads: RowThreads | None = None
    ) -> None:
        self._model = model
        self._packed = packed
        self._temperature = temperature
        self._replay: ExpertReplay | None = None
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.module.forward).parameters
        if packed:
            self._check_packing()
        self._shares_prefixes = self._can_share_prefixes()
        self._threads = threads

    def train(
        self,
        parts: Iterable[BatchedDataDict],
        loss: MicrobatchLoss,
    ) -> None:
        """Run forward and backward passes; then every gradient is the sum over micro-batches and ranks. A collective.

        Args:
            parts: micro-batches, on any device.
            loss: computes the loss from the log-probabilities and the micro-batch; see `LossFunction`.
        """
        for part in parts:
            part = part.to(self._model.device)
            rows = self._rows(part)
            if len(rows) == 1:
                loss(self._run(self._lay_out(part, only_loss_tokens=True), part.get("top_ids")), part).backward()
            else:
                self._train_in_threads([part.slice(row.start, row.stop) for row in rows], part, loss)
        self._model.reduce_gradients()

    def _train_in_threads(self, rows: list[SlicedDataDict], part: BatchedDataDict, loss: MicrobatchLoss) -> None:
        """Add the gradients of a micro-batch; see `row_parts`."""
        threads = self._threads
        assert threads is not None, "the micro-batch is divided"
        outputs = threads.map(
            lambda row: self._run(self._lay_out(row, only_loss_tokens=True), row.get("top_ids")), rows
        )
        logprobs = torch.cat([output.detach() for output in outputs]).requires_grad_()
        loss(logprobs, part).backward()
        assert logprobs.grad is not None, "the loss depends on the log-probabilities"
        parameters = [parameter for parameter in self._model.module.parameters() if parameter.requires_grad]

        def backward(item: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
            output, gradient = item
            return torch.autograd.grad(output, parameters, gradient, allow_unused=True)

        gradients = threads.map(backward, list(zip(outputs, logprobs.grad.split([len(o) for o in outputs]))))
        for parameter, *of_rows in zip(parameters, *gradients, strict=True):
            known = [gradient for gradient in (parameter.grad, *of_rows) if gradient is not None]
            parameter.grad = functools.reduce(torch.add, known) if known else None

    def logprobs(self, parts: Iterable[BatchedDataDict]) -> Iterator[torch.Tensor]:
        """Yield the [b, T] float32 log-probabilities of each micro-batch, without gradient.

        A batch with a `token_mask` needs only those of its tokens; the others may be 0.
        """
        for part in parts:
            rows = [part.slice(row.start, row.stop) for row in self._rows(part)]
            with torch.no_grad():
                results = map_rows(self._threads, lambda row: self._run(self._inputs(row)), rows)
            yield torch.cat(results)

    def top_logprobs(
        self, parts: Iterable[BatchedDataDict], k: int, num_tokens: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the `k` most probable of the first `num_tokens` tokens of the vocabulary, without gradient.

        Yields:
            For each micro-batch their ids [b, T, k] int32, and [b, T, k + 1] float32, see `group_logprobs`. Positions
            are those of `logprobs`.
        """

        def of_rows(part: BatchedDataDict) -> tuple[torch.Tensor, torch.Tensor]:
            inputs = self._inputs(part)
            logits = self._logits(inputs)
            ids = torch.cat([logits[rows, :num_tokens].topk(k).indices for rows in row_chunks(logits)])
            logprobs = group_logprobs(logits, ids, self._temperature)
            return inputs.scatter(ids.int()), inputs.scatter(logprobs)

        for part in parts:
            rows = [part.slice(row.start, row.stop) for row in self._rows(part)]
            with torch.no_grad():
                ids, logprobs = zip(*map_rows(self._threads, of_rows, rows), strict=True)
            yield torch.cat(ids), torch.cat(logprobs)

    def _rows(self, part: BatchedDataDict) -> list[slice]:
        """Return the rows of a micro-batch that one thread each computes."""
        # Recorded experts are set in the model, for one pass at a time.
        if self._threads is None or part.size == 1 or ROUTED_EXPERTS in part:
            return [slice(0, part.size)]
        return row_parts(part, self._threads.num_threads)

    def _inputs(self, part: BatchedDataDict) -> ModelInputs:
        return self._lay_out(part.to(self._model.device), only_loss_tokens="token_mask" in part)

    def _lay_out(self, part: BatchedDataDict, *, only_loss_tokens: bool) -> ModelInputs:
        # Each sequence has its own experts, also for the tokens that it shares.
        shares = self._shares_prefixes and ROUTED_EXPERTS not in part
        inputs = model_inputs(part, packed=self._packed, only_loss_tokens=only_loss_tokens, shares_prefixes=shares)
        self._use_experts(part, inputs)
        return inputs

    def _use_experts(self, part: BatchedDataDict, inputs: ModelInputs) -> None:
        """Let the next pass, and the backward pass after it, use the experts of the micro-batch if it has some."""
        experts = part.get(ROUTED_EXPERTS)
        if experts is not None and self._replay is None:
            self._replay = ExpertReplay(self._model.module)
        if self._replay is not None:
            known = None if experts is None else known_experts(experts, part["input_lengths"])
            self._replay.use(None if known is None else inputs.at_inputs(known).flatten(0, 1))

    def _run(self, inputs: ModelInputs, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return [b, T] log-probabilities of the tokens, or with `ids` [b, T, K] those of `group_logprobs`."""
        logits = self._logits(inputs)
        if ids is None:
            return inputs.scatter(token_logprobs(logits, inputs.tokens, self._temperature))
        return inputs.scatter(group_logprobs(logits, inputs.gather(ids).long(), self._temperature))

    def _logits(self, inputs: ModelInputs) -> torch.Tensor:
        """Return the [R * K, V] logits that are needed."""
        options: dict[str, Any] = {}
        if inputs.position_ids is not None:
            options["position_ids"] = inputs.position_ids
        if self._keeps_logits:
            options["logits_to_keep"] = inputs.logits_to_keep
        if inputs.shared_prefixes is not None:
            # transformers passes a mask with four dimensions on as it is. Attention takes the layout instead.
            options["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool)
            options["shared_prefixes"] = inputs.shared_prefixes
        with self._model.precision():
            logits = self._model.module(input_ids=inputs.input_ids, use_cache=False, **options).logits
        if not self._keeps_logits:
            kept = inputs.logits_to_keep
            logits = logits[:, -kept:] if isinstance(kept, int) else logits[:, kept]
        return logits.flatten(0, 1)

    def _can_share_prefixes(self) -> bool:
        """Whether the model's attention knows the layout with shared prefixes, tried on a small batch."""
        config = self._model.config
        windows = [kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"]
        if config._attn_implementation != CPU_ATTENTION or windows or getattr(config, "sliding_window", None):
            return False
        ids = torch.tensor([[3, 1, 4, 1, 5], [3, 1, 4, 9, 2], [7, 7, 6, 5, 3]])
        batch = BatchedDataDict(
            input_ids=ids % config.get_text_config().vocab_size,
            input_lengths=torch.tensor([5, 5, 5]),
            token_mask=torch.tensor([[0, 0, 0, 1, 1]]).expand(3, -1),
        )
        plain, shared = (
            model_inputs(batch, packed=False, only_loss_tokens=True, shares_prefixes=shares) for shares in (False, True)
        )
        assert shared.shared_prefixes is not None, "the batch has a common prefix"
        with torch.no_grad():
            try:
                error = float((self._run(plain) - self._run(shared)).abs().max())
            except TypeError as unknown_argument:
                logger.debug("prefixes are not shared: %s", unknown_argument)
                return False
        return error * self._temperature <= _PACKING_TOLERANCE[False]

    def _check_packing(self) -> None:
        # Rounding errors grow as 1 / temperature.
        check_packing(
            self._model,
            lambda batch, packed: (
                self._temperature * self._run(model_inputs(batch, packed=packed, only_loss_tokens=False))
            ),
        )


def check_packing(model: ParallelModel, outputs: Callable[[BatchedDataDict, bool], torch.Tensor]) -> None:
    """Check that transformers derives the attention mask from positions, which not every architecture does.

    Args:
        model: the model.
        outputs: returns log-probabilities, or what is as large, of a batch, packed or not.

    Raises:
        ModelError: packed sequences attend to each other.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 0, 0]], device=model.device) % vocabulary
    batch = BatchedDataDict(input_ids=ids, input_lengths=torch.tensor([6, 4], device=model.device))
    with torch.no_grad():
        error = float((outputs(batch, False) - outputs(batch, True)).abs().max())
    if not error <= _PACKING_TOLERANCE[model.bfloat16]:
        attention = model.config._attn_implementation
        raise ModelError(
            f"{type(model.module).__name__} with policy.attn_implementation={attention} lets packed sequences attend "
            f"to each other (its outputs differ by {error:.3g}): set policy.batching.mode to dynamic or fixed"
        )


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Compute log softmax(logits / temperature)[n, tokens[n]] in float32, one chunk of rows at a time.

    The backward pass allocates one more buffer of the logits' size and dtype (their gradient). Neither pass holds more
    than `CHUNK_ELEMENTS` elements in float32.

    Example:
        >>> token_logprobs(torch.zeros(2, 4), torch.tensor([0, 3])).exp()
        tensor([0.2500, 0.2500])

    Args:
        logits: [N, V], any floating dtype.
        tokens: [N] int64.
        temperature: greater than 0.

    Returns:
        [N] float32, differentiable with respect to `logits`.
    """
    result: torch.Tensor = _TokenLogprobs.apply(logits, tokens, temperature)
    return result


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
        logprobs = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
        normalizers = torch.empty_like(logprobs)
        for rows in row_chunks(logits):
            chunk = scaled(logits[rows].float(), temperature)
            normalizers[rows] = torch.logsumexp(chunk, dim=-1)
            logprobs[rows] = chunk.gather(-1, tokens[rows, None]).squeeze(-1)
        logprobs -= normalizers
        ctx.save_for_backward(logits, tokens, normalizers)
        ctx.temperature = temperature
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, tokens, normalizers = ctx.saved_tensors
        (gradient,) = gradients
        logits_gradient = torch.empty_like(logits)
        for rows in row_chunks(logits):
            # d logprob / d logits = (onehot(token) - softmax(logits / temperature)) / temperature
            weight = scaled(gradient[rows, None], ctx.temperature)
            chunk = scaled(logits[rows].float(), ctx.temperature) - normalizers[rows, None]
            chunk = chunk.exp_().mul_(-weight)
            logits_gradient[rows] = chunk.scatter_add_(-1, tokens[rows, None], weight)
        return logits_gradient, None, None


def group_logprobs(logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Compute log-probabilities of K tokens, and of all other tokens together, in float32.

    The probability of the others is summed over their logits. It would be lost to rounding if it were computed as
    1 minus that of the K tokens, which is often almost 1. Memory is as in `token_logprobs`, but three chunks are held
    in float32 at a time.

    Example:
        >>> group_logprobs(torch.zeros(1, 4), torch.tensor([[0, 3]])).exp()
        tensor([[0.2500, 0.2500, 0.5000]])

    Args:
        logits: [N, V], any floating dtype.
        ids: [N, K] int64, different tokens in each row; K < V.
        temperature: greater than 0.

    Returns:
        [N, K + 1] float32, the last column for the other tokens; differentiable with respect to `logits`.
    """
    result: torch.Tensor = _GroupLogprobs.apply(logits, ids, temperature)
    return result


class _GroupLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
        num_rows, count = ids.shape
        logprobs = torch.empty(num_rows, count + 1, dtype=torch.float32, device=logits.device)
        normalizers = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
        for rows in row_chunks(logits):
            chunk = scaled(logits[rows].float(), temperature)
            logprobs[rows, :count] = chunk.gather(-1, ids[rows])
            logprobs[rows, count] = torch.logsumexp(chunk.scatter(-1, ids[rows], -torch.inf), dim=-1)
            normalizers[rows] = torch.logsumexp(chunk, dim=-1)
        ctx.save_for_backward(logits, ids, normalizers, logprobs[:, count].clone())
        ctx.temperature = temperature
        return logprobs.sub_(normalizers[:, None])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, ids, normalizers, of_others = ctx.saved_tensors
        (gradient,) = gradients
        logits_gradient = torch.empty_like(logits)
        for rows in row_chunks(logits):
            # For one of the K tokens: d logprob / d logits = (onehot - softmax(logits / temperature)) / temperature.
            # For the others, onehot is replaced by their share of the probability of all others.
            weight = scaled(gradient[rows], ctx.temperature)
            chunk = scaled(logits[rows].float(), ctx.temperature)
            shares = (chunk - of_others[rows, None]).scatter_(-1, ids[rows], -torch.inf).exp_()
            total = (chunk - normalizers[rows, None]).exp_().mul_(-weight.sum(dim=-1, keepdim=True))
            total.addcmul_(shares, weight[:, -1:])
            logits_gradient[rows] = total.scatter_add_(-1, ids[rows], weight[:, :-1])
        return logits_gradient, None, None


def scaled(values: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return values / temperature; at temperature 1 the values themselves, without a copy."""
    return values if temperature == 1.0 else values / temperature


def row_chunks(logits: torch.Tensor) -> list[slice]:
    """Return slices of rows of [N, V] logits with at most `CHUNK_ELEMENTS` elements each."""
    num_rows, vocabulary = logits.shape
    size = max(1, CHUNK_ELEMENTS // max(1, vocabulary))
    return [slice(start, start + size) for start in range(0, num_rows, size)]
