"""The forward pass from a micro-batch to the log-probabilities of its tokens."""

from __future__ import annotations

import inspect

import torch

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import ModelError
from nemo_rl.models.policy.microbatching import ModelInputs, model_inputs
from nemo_rl.models.policy.parallel_model import ParallelModel
from nemo_rl.models.policy.token_logprobs import token_logprobs

# Packed and padded passes of one model differ by rounding only; a token that sees another sequence differs by far more.
_PACKING_TOLERANCE = {True: 0.1, False: 1e-3}  # in nats, by whether matrices are multiplied in bfloat16


class LogprobForward:
    """Log-probabilities [b, T] float32 of a micro-batch under `model`, with gradient where enabled.

    Args:
        model: whose precision and sharding the pass follows.
        packed: lay the sequences of a micro-batch end to end.

    Raises:
        ModelError: with `packed`, when the model lets packed sequences see each other.
    """

    def __init__(self, model: ParallelModel, *, packed: bool) -> None:
        self._model = model
        self._packed = packed
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.module.forward).parameters
        if packed:
            self._check_packing()

    def __call__(self, batch: BatchedDataDict, *, only_loss_tokens: bool) -> torch.Tensor:
        """See `microbatching.model_inputs` for the arguments."""
        return self._run(model_inputs(batch, packed=self._packed, only_loss_tokens=only_loss_tokens))

    def _run(self, inputs: ModelInputs) -> torch.Tensor:
        options: dict[str, int | torch.Tensor] = {}
        if inputs.position_ids is not None:
            options["position_ids"] = inputs.position_ids
        if self._keeps_logits:
            options["logits_to_keep"] = inputs.logits_to_keep
        with self._model.precision():
            logits = self._model.module(input_ids=inputs.input_ids, use_cache=False, **options).logits
        if not self._keeps_logits:
            kept = inputs.logits_to_keep
            logits = logits[:, -kept:] if isinstance(kept, int) else logits[:, kept]
        return inputs.scatter(token_logprobs(logits.flatten(0, 1), inputs.tokens))

    def _check_packing(self) -> None:
        """Packing relies on transformers deriving the attention mask from positions; not every architecture does."""
        device = next(self._model.module.parameters()).device
        vocabulary = self._model.config.get_text_config().vocab_size
        ids = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 0, 0]], device=device) % vocabulary
        batch = BatchedDataDict(input_ids=ids, input_lengths=torch.tensor([6, 4], device=device))
        with torch.no_grad():
            padded, packed = (
                self._run(model_inputs(batch, packed=packed, only_loss_tokens=False)) for packed in (False, True)
            )
        error = float((padded - packed).abs().max())
        bfloat16 = self._model.bfloat16
        if not error <= _PACKING_TOLERANCE[bfloat16]:
            attention = self._model.config._attn_implementation
            raise ModelError(
                f"{type(self._model.module).__name__} with policy.attn_implementation={attention} lets packed "
                f"sequences see each other (log-probabilities differ by {error:.3g}): set policy.batching.mode to "
                "dynamic or fixed"
            )
