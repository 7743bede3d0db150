"""A generation backend in one file: completions by `transformers.generate`. docs/adding-a-backend.md walks through it.

uv run examples/backends/run_with_transformers_generation.py grpo.max_num_steps=3
"""

from __future__ import annotations

import socket
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_rl.errors import WeightSyncError
from nemo_rl.models.generation.config import GenerationConfig, SamplingConfig
from nemo_rl.models.generation.interfaces import GenerationResult
from nemo_rl.models.generation.results import Completion, make_result
from nemo_rl.models.generation.worker_base import GenerationWorkerBase
from nemo_rl.models.weights.digest import check_digest, digest_tensors, dtype_by_name
from nemo_rl.models.weights.interfaces import WeightUpdate
from nemo_rl.models.weights.receiver import receive
from nemo_rl.models.worker_process import take_cpu_share


class TransformersGenerationWorker(GenerationWorkerBase):
    """Completes its share of every call's prompts; the arguments are what `Generation` passes to every backend."""

    def __init__(
        self,
        model_name: str,
        config: GenerationConfig,
        *,
        max_sequence_length: int,
        tokenizer_name: str | None = None,
        precision: str = "float32",
        use_gpu: bool = False,
        num_local_workers: int = 1,
    ) -> None:
        if not use_gpu:
            take_cpu_share(config.num_threads, num_local_workers)
        dtype = dtype_by_name(config.precision or precision)
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype)
        self._model.to("cuda" if use_gpu else "cpu").eval()
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or model_name)
        self._config = config
        self._max_sequence_length = max_sequence_length
        self._ends = {self._tokenizer.eos_token_id, *config.stop_token_ids}
        self._version: int | None = None

    def update_weights(self, update: WeightUpdate) -> str:
        """Load published weights, and return the digest over the memory that this worker computes with."""
        own = dict(self._model.named_parameters())
        with torch.no_grad():
            names = []
            for name, tensor in receive(update, device=self._model.device, verify=False):
                own[name].copy_(tensor)
                names.append(name)
        digest = digest_tensors((name, own[name]) for name in names)
        check_digest(version=update.version, expected=update.digest, found=digest, where=socket.gethostname())
        self._version = update.version
        return digest

    def generate(
        self,
        prompts: dict[str, torch.Tensor],
        *,
        seed: int,
        num_generations: int,
        greedy: bool,
        sampling: SamplingConfig | None,
        first_prompt: int,
    ) -> GenerationResult:
        """Complete prompts one by one, each with a seed of its own: who else is in the batch changes nothing."""
        if self._version is None:
            raise WeightSyncError("this worker has no weights: call update_weights before generate")
        rows: list[list[int]] = []
        completions: list[Completion] = []
        pairs = zip(prompts["input_ids"].tolist(), prompts["input_lengths"].tolist(), strict=True)
        for index, (ids, length) in enumerate(pairs):
            torch.manual_seed((seed + first_prompt + index) % 2**63)
            rows += [ids[:length]] * num_generations
            completions += self._complete(ids[:length], num_generations, greedy, sampling or self._config)
        return make_result(
            rows, completions, tokenizer=self._tokenizer, weights_version=self._version, where=socket.gethostname()
        )

    def _complete(self, prompt: list[int], count: int, greedy: bool, sampling: SamplingConfig) -> list[Completion]:
        limit = min(self._config.max_new_tokens, self._max_sequence_length - len(prompt))
        draw = (
            {"do_sample": False}
            if greedy
            else {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or 0,
            }
        )
        ids = torch.tensor([prompt] * count, device=self._model.device)
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            eos_token_id=sorted(self._ends),
            pad_token_id=self._tokenizer.eos_token_id,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
            **draw,
        )
        tokens = output.sequences[:, len(prompt) :]
        raw = _logprobs_of(tokens, output.logits)
        drawn_from = torch.zeros_like(raw) if greedy else _logprobs_of(tokens, output.scores)
        completions = []
        for row, new in enumerate(tokens.tolist()):
            end = next((place + 1 for place, token in enumerate(new) if token in self._ends), None)
            kept = slice(0, end if end is not None else len(new))
            completions.append(
                Completion(tokens[row, kept].cpu(), raw[row, kept].cpu(), drawn_from[row, kept].cpu(), end is None)
            )
        return completions

    def attestation(self) -> dict[str, Any]:
        """What this worker runs on and with."""
        return {**super().attestation(), "weights_version": self._version}


def _logprobs_of(tokens: torch.Tensor, steps: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """tokens [B, n], and n times logits [B, V] -> [B, n] float32"""
    logprobs = torch.stack(steps, dim=1).float().log_softmax(-1)
    return logprobs.gather(-1, tokens[..., None])[..., 0]
