"""A generation backend in one file: completions by `transformers.generate`. docs/adding-a-backend.md explains it.

uv run examples/backends/run_with_transformers_generation.py grpo.max_num_steps=3
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from nemo_rl.models.generation.config import SamplingConfig
from nemo_rl.models.generation.generator import Generator, GeneratorSpec
from nemo_rl.models.generation.interfaces import GenerationRequest, GenerationResult
from nemo_rl.models.generation.results import Completion, make_result
from nemo_rl.models.generation.worker import GenerationWorker
from nemo_rl.models.weights.digest import check_digest, digest_tensors, dtype_by_name
from nemo_rl.models.weights.interfaces import WeightUpdate
from nemo_rl.models.weights.receiver import receive


class TransformersGenerator(Generator):
    """Completes prompts with `transformers.generate`, one prompt at a time."""

    def __init__(self, spec: GeneratorSpec) -> None:
        super().__init__(spec)
        dtype = dtype_by_name(spec.precision)
        self._model: Any = AutoModelForCausalLM.from_pretrained(spec.model_name, dtype=dtype)
        self._model.to(spec.device).eval()

    def update_weights(self, update: WeightUpdate) -> str:
        """Copy the published weights into the model; returns the digest over the model's memory."""
        parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            names = []
            for name, tensor in receive(update, device=self._model.device, verify=False):
                parameters[name].copy_(tensor)
                names.append(name)
        digest = digest_tensors((name, parameters[name]) for name in names)
        check_digest(version=update.version, expected=update.digest, found=digest, where=self.spec.name)
        self.version = update.version
        return digest

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """Complete prompts one by one, each with its own seed: the other prompts of the batch do not matter."""
        version = self.weights_version()
        prompts = request.prompts()
        completions: list[Completion] = []
        for position, prompt in zip(request.positions, prompts, strict=True):
            torch.manual_seed((request.seed + position) % 2**63)
            completions += self._complete(prompt, request)
        rows = [prompt for prompt in prompts for _ in range(request.num_generations)]
        return make_result(rows, completions, tokenizer=self.tokenizer, weights_version=version, where=self.spec.name)

    def _complete(self, prompt: list[int], request: GenerationRequest) -> list[Completion]:
        config = self.spec.config
        ids = torch.tensor([prompt] * request.num_generations, device=self._model.device)
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(config.max_new_tokens, self.spec.max_sequence_length - len(prompt)),
            eos_token_id=sorted(self.stop.token_ids),
            pad_token_id=self.tokenizer.eos_token_id,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
            **_sampling_arguments(request.sampling or config, greedy=request.greedy),
        )
        tokens = output.sequences[:, len(prompt) :]
        temperature = 1.0 if request.greedy else (request.sampling or config).temperature
        logprobs = _logprobs_of(tokens, tuple(logits / temperature for logits in output.logits))
        sampling_logprobs = torch.zeros_like(logprobs) if request.greedy else _logprobs_of(tokens, output.scores)
        completions = []
        for row, row_tokens in enumerate(tokens.tolist()):
            end = self.stop.first_end(row_tokens, 0)
            kept = slice(0, end)
            completions.append(
                Completion(
                    tokens[row, kept].cpu(),
                    logprobs[row, kept].cpu(),
                    sampling_logprobs[row, kept].cpu(),
                    truncated=end is None,
                )
            )
        return completions


class TransformersGenerationWorker(GenerationWorker):
    """Runs a `TransformersGenerator` in a Ray actor."""

    def make_generator(self, spec: GeneratorSpec) -> TransformersGenerator:
        return TransformersGenerator(spec)


def _sampling_arguments(sampling: SamplingConfig, *, greedy: bool) -> dict[str, Any]:
    if greedy:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or 0,
    }


def _logprobs_of(tokens: torch.Tensor, steps: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the log-probabilities of tokens [B, n] under n logits [B, V]; [B, n] float32."""
    logprobs = torch.stack(steps, dim=1).float().log_softmax(-1)
    return logprobs.gather(-1, tokens[..., None])[..., 0]
