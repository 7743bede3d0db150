"""The sampling loop, in one plain process: prompts and published weights in, a `GenerationResult` out.

update_weights ──► Decoder (weights as views onto shared memory)
generate ──► rows in batches ──► prefill each distinct prompt once
                                 ┌─► draw a token per row ──► any row ended? note it, drop ended rows ─┐
                                 └───────────────────────── decoder step ◄─────────────────────────────┘
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nemo_rl.errors import ModelError, WeightSyncError
from nemo_rl.models import onednn
from nemo_rl.models.generation.config import GenerationConfig, SamplingConfig
from nemo_rl.models.generation.interfaces import GenerationResult
from nemo_rl.models.generation.prompts import check_prompt_lengths
from nemo_rl.models.generation.results import PADDING, make_result
from nemo_rl.models.generation.sampling import Sampler, row_uniforms
from nemo_rl.models.generation.stop import StopRules, end_of_sequence_ids
from nemo_rl.models.generation.torch.decoder import Decoder, PromptBatch, make_decoder
from nemo_rl.models.generation.torch.progress import Completions, Progress
from nemo_rl.models.weights.digest import check_digest
from nemo_rl.models.weights.interfaces import WeightStream, WeightUpdate
from nemo_rl.models.weights.receiver import receive

# Looking for ended rows waits for the device: free on a CPU, but it would drain a GPU's queue of kernels.
_STEPS_BETWEEN_CHECKS = {"cpu": 1}
_DEFAULT_STEPS_BETWEEN_CHECKS = 8


class TorchGenerator:
    """Completes prompts with one model in this process."""

    def __init__(
        self,
        model_name: str,
        config: GenerationConfig,
        *,
        max_sequence_length: int,
        tokenizer_name: str | None = None,
        precision: str = "float32",
        device: str | torch.device = "cpu",
        name: str = "the generator",
    ) -> None:
        """Read configuration and tokenizer; weights come with `update_weights`.

        Args:
            model_name: Hugging Face directory or hub name.
            config: how to sample and when to stop.
            max_sequence_length: longest prompt plus completion, in tokens.
            tokenizer_name: where the tokenizer comes from; None: the model's own.
            precision: "float32" or "bfloat16"; `config.precision` wins.
            device: where to compute.
            name: of this generator, for messages.

        Raises:
            ModelError: configuration or tokenizer cannot be read.
        """
        from transformers import AutoConfig, AutoTokenizer

        try:
            model_config = AutoConfig.from_pretrained(model_name)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_name or model_name)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read the model {model_name!r}: {error}") from error
        self.name = name
        self.config = config
        self.device = torch.device(device)
        self.precision = config.precision or precision
        self.max_sequence_length = max_sequence_length
        dtype: torch.dtype = getattr(torch, self.precision)
        onednn.warn_if_emulated(self.device.type, dtype)
        self.decoder: Decoder = make_decoder(model_config, self.device, dtype, max_sequence_length)
        stop_ids = set(config.stop_token_ids) | end_of_sequence_ids(model_config, self.tokenizer)
        self._stop = StopRules(self.tokenizer, stop_ids, config.stop_strings)
        self.version: int | None = None

    def update_weights(self, update: WeightUpdate | WeightStream) -> str:
        """Switch to other weights; the previous ones are let go. Returns the digest over this process's memory.

        Raises:
            WeightSyncError: they arrived damaged or are another model's; nothing can be generated until the next
                update succeeds.
        """
        self.version = None
        # On a CPU the decoder computes with the very memory that they arrive in, where that may be.
        weights = receive(update, device=self.device, verify=False, keeps=True)
        with contextlib.closing(weights):
            self.decoder.load(weights)
        digest = weights.digest_of(self.decoder.named_tensors())
        check_digest(version=update.version, expected=weights.digest, found=digest, where=self.name)
        self.version = update.version
        return digest

    def generate(
        self,
        input_ids: torch.Tensor,
        input_lengths: torch.Tensor,
        *,
        seed: int,
        num_generations: int = 1,
        greedy: bool = False,
        sampling: SamplingConfig | None = None,
        first_prompt: int = 0,
    ) -> GenerationResult:
        """Complete prompts; the arguments are those of `GenerationInterface.generate`.

        Args:
            input_ids: [N, P] int64, padded on the right.
            input_lengths: [N] int64.
            seed: of the draws.
            num_generations: completions per prompt; results come prompt by prompt.
            greedy: take the likeliest token.
            sampling: replaces the configured temperature, top-p and top-k.
            first_prompt: position of the first of these prompts in the whole call, of which they are a part.
        """
        if self.version is None:
            raise WeightSyncError(f"{self.name} has no weights: call update_weights before generate")
        lengths: list[int] = input_lengths.tolist()
        check_prompt_lengths(lengths, self.max_sequence_length, first_prompt)
        prompts = [row[:length] for row, length in zip(input_ids.tolist(), lengths, strict=True)]
        sampler = Sampler(sampling or self.config, greedy=greedy)
        first_row = first_prompt * num_generations
        prompt_of_row = [index for index in range(len(prompts)) for _ in range(num_generations)]
        parts: list[Completions] = []
        with torch.inference_mode():
            for start in range(0, len(prompt_of_row), self.config.max_batch_size):
                batch = prompt_of_row[start : start + self.config.max_batch_size]
                rows = np.arange(start, start + len(batch)) + first_row
                uniforms = row_uniforms(seed, rows, self.config.max_new_tokens)
                parts.append(self._complete([prompts[index] for index in batch], uniforms, sampler))
        return self._result([prompts[index] for index in prompt_of_row], parts)

    def attestation(self) -> dict[str, Any]:
        """What this generator computes with."""
        return {"decoder": type(self.decoder).__name__, "precision": self.precision, "device": str(self.device)}

    def _complete(self, prompts: list[list[int]], uniforms: torch.Tensor, sampler: Sampler) -> Completions:
        """One batch of B rows; uniforms [B, max_new_tokens]."""
        limits = [min(self.config.max_new_tokens, self.max_sequence_length - len(prompt)) for prompt in prompts]
        progress = Progress(self._stop, limits, self.device)
        decoding = self.decoder.prefill(*self._prompt_batch(prompts), max(limits))
        uniforms = uniforms.to(self.device)
        interval = _STEPS_BETWEEN_CHECKS.get(self.device.type, _DEFAULT_STEPS_BETWEEN_CHECKS)
        for index in range(max(limits)):
            drawn = sampler.draw(decoding.logits, uniforms[:, index])
            progress.append(drawn)
            tokens = drawn.tokens
            last = index + 1 == max(limits)
            if last or (index + 1) % interval == 0:
                keep = progress.check()
                if last or not progress.num_live:
                    break
                if keep is not None:
                    decoding.keep(keep)
                    uniforms, tokens = uniforms[keep], tokens[keep]
            decoding.step(tokens)
        return progress.completions()

    def _prompt_batch(self, prompts: Sequence[list[int]]) -> tuple[PromptBatch, torch.Tensor]:
        """Distinct prompts, padded on the left, and which of them each row continues."""
        positions: dict[tuple[int, ...], int] = {}
        copies = [positions.setdefault(tuple(prompt), len(positions)) for prompt in prompts]
        width = max(map(len, positions))
        padded = [[PADDING] * (width - len(prompt)) + list(prompt) for prompt in positions]
        padding = [width - len(prompt) for prompt in positions]
        batch = PromptBatch(
            torch.tensor(padded, device=self.device),
            torch.tensor(padding, device=self.device) if any(padding) else None,
        )
        return batch, torch.tensor(copies, device=self.device)

    def _result(self, prompts: list[list[int]], parts: list[Completions]) -> GenerationResult:
        assert self.version is not None
        rows = [row for part in parts for row in part.rows()]
        return make_result(prompts, rows, tokenizer=self.tokenizer, weights_version=self.version, where=self.name)
