"""The sampling loop of the torch backend, in one process: a request and published weights in, a result out.

update_weights ──► Decoder (weights as views onto shared memory)
generate ──► rows in batches ──► prefill each distinct prompt once
                                 ┌─► some rows ended? record and drop them ─┐
                                 └────── decoder step, draw per row ◄───────┘
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from nemo_rl.models import onednn
from nemo_rl.models.generation.generator import Generator, GeneratorSpec
from nemo_rl.models.generation.interfaces import GenerationRequest, GenerationResult
from nemo_rl.models.generation.results import PADDING, make_result
from nemo_rl.models.generation.sampling import Sampler, row_uniforms
from nemo_rl.models.generation.torch.decoder import Decoder, PromptBatch
from nemo_rl.models.generation.torch.hf_decoder import HFDecoder
from nemo_rl.models.generation.torch.llama_decoder import LlamaDecoder
from nemo_rl.models.generation.torch.progress import Completions, Progress
from nemo_rl.models.row_threads import RowThreads, map_rows
from nemo_rl.models.weights.adapters import ReceivedBase
from nemo_rl.models.weights.interfaces import WeightStream, WeightUpdate
from nemo_rl.models.weights.receiver import receive

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The check for ended rows waits for the device. This is free on a CPU, but drains a GPU's queue of kernels.
_STEPS_BETWEEN_CHECKS = {"cpu": 1}
_DEFAULT_STEPS_BETWEEN_CHECKS = 8
# A decode step of so few rows takes almost as long as that of twice as many.
_LEAST_ROWS_PER_THREAD = 8


class TorchGenerator(Generator):
    """Completes prompts with a decoder in plain torch or transformers.

    Example:

        generator = TorchGenerator(GeneratorSpec("model/", GenerationConfig(), max_sequence_length=512))
        generator.update_weights(publish(model.named_parameters(), version=1, dtype="float32", transport="local"))
        result = generator.generate(GenerationRequest(input_ids, input_lengths, seed=0))
    """

    def __init__(self, spec: GeneratorSpec) -> None:
        super().__init__(spec)
        self.device = torch.device(spec.device)
        dtype: torch.dtype = getattr(torch, spec.precision)
        onednn.warn_if_emulated(self.device.type, dtype)
        self._base = ReceivedBase()
        self.decoder = make_decoder(
            self.model_config,
            self.device,
            dtype,
            spec.max_sequence_length,
            records_experts=spec.config.router_replay,
        )
        self._threads: RowThreads | None = None

    def use_threads(self, num_threads: int) -> None:
        """Divide the rows of a batch over threads, or decode in one thread if threads would wait for the interpreter.

        For small models: their operations are too short to be divided over threads.
        """
        if num_threads > 1 and self.decoder.runs_without_interpreter:
            self._threads = RowThreads(num_threads)
        else:
            torch.set_num_threads(1)

    def update_weights(self, update: WeightUpdate | WeightStream) -> str:
        """Replace the weights. See `Generator.update_weights`; after an error there are no weights."""
        self.version = None
        # On a CPU the decoder computes with the memory in which the weights arrive, where possible.
        weights = receive(update, device=self.device, verify=False, keeps=True, base=self._base)
        with contextlib.closing(weights):
            self.decoder.load(weights)
        digest = weights.confirm(weights.digest_of(self.decoder.named_tensors()), where=self.spec.name)
        self.version = update.version
        return digest

    def generate(self, request: GenerationRequest) -> GenerationResult:
        version, config = self.weights_version(), self.spec.config
        request.check_prompt_lengths(self.spec.max_sequence_length)
        sampler = Sampler(request.sampling or config, greedy=request.greedy)
        random_rows = request.random_rows()
        prompts = [prompt for prompt in request.prompts() for _ in range(request.num_generations)]
        batches: list[Completions] = []
        num_threads = 1 if self._threads is None else self._threads.num_threads
        for start in range(0, len(prompts), config.max_batch_size):
            batch = prompts[start : start + config.max_batch_size]
            rows = random_rows[start : start + len(batch)]
            uniforms = row_uniforms(request.seed, rows, config.max_new_tokens)
            parts = [
                (batch[part], uniforms[part]) for part in row_parts(len(batch), request.num_generations, num_threads)
            ]
            batches += map_rows(self._threads, lambda part: self._complete(*part, sampler), parts)
        completions = [completion for batch in batches for completion in batch.rows()]
        return make_result(
            prompts, completions, tokenizer=self.tokenizer, weights_version=version, where=self.spec.name
        )

    def attestation(self) -> dict[str, Any]:
        num_threads = torch.get_num_threads() if self._threads is None else self._threads.num_threads
        return {**super().attestation(), "decoder": type(self.decoder).__name__, "num_threads": num_threads}

    @torch.inference_mode()
    def _complete(self, prompts: list[list[int]], uniforms: torch.Tensor, sampler: Sampler) -> Completions:
        """Complete one batch of B rows; uniforms [B, max_new_tokens]."""
        limits = [
            min(self.spec.config.max_new_tokens, self.spec.max_sequence_length - len(prompt)) for prompt in prompts
        ]
        progress = Progress(self.stop, limits, self.device)
        batch, copies = self._prompt_batch(prompts)
        decoding = self.decoder.prefill(batch, copies, max(limits))
        uniforms = uniforms.to(self.device)
        interval = _STEPS_BETWEEN_CHECKS.get(self.device.type, _DEFAULT_STEPS_BETWEEN_CHECKS)
        longest = max(limits)
        drawn = sampler.draw(decoding.logits, uniforms[:, 0])
        for length in range(1, longest + 1):
            progress.append(drawn)
            tokens = drawn.tokens
            if length == longest or length % interval == 0:
                keep = progress.check()
                if length == longest or not progress.num_live:
                    break
                if keep is not None:
                    decoding.keep(keep)
                    uniforms, tokens = uniforms[keep], tokens[keep]
            drawn = decoding.step_and_draw(tokens, sampler, uniforms[:, length], progress.stop_ids)
        completions = progress.completions()
        if decoding.experts is None:
            return completions
        experts, width = decoding.experts.cpu(), batch.input_ids.shape[1]
        starts = [width - len(prompt) for prompt in prompts]
        ends = [width + length - 1 for length in completions.lengths]
        chosen = [row[start:end] for row, start, end in zip(experts, starts, ends, strict=True)]
        return replace(completions, experts=chosen)

    def _prompt_batch(self, prompts: Sequence[list[int]]) -> tuple[PromptBatch, torch.Tensor]:
        """Return the distinct prompts, padded on the left, and the prompt that each row continues."""
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


def row_parts(num_rows: int, group: int, num_threads: int) -> list[slice]:
    """Divide rows, of which each `group` in sequence continue one prompt, into at most one part per thread."""
    num_groups = math.ceil(num_rows / group)
    count = max(1, min(num_threads, num_groups, num_rows // _LEAST_ROWS_PER_THREAD))
    bounds = [min(num_rows, num_groups * part // count * group) for part in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def make_decoder(
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    max_length: int,
    *,
    records_experts: bool = False,
) -> Decoder:
    """Return the fastest decoder for a model: hand-written for Llama-like families, else transformers' forward pass.

    Args:
        config: The model's configuration.
        device: Where weights and caches are stored.
        dtype: Data type to compute in; logits are always float32.
        max_length: Longest prompt plus completion.
        records_experts: Record the experts that each token is sent to.
    """
    if LlamaDecoder.supports(config):
        return LlamaDecoder(config, device, dtype, max_length)
    return HFDecoder(config, device, dtype, max_length, records_experts=records_experts)
