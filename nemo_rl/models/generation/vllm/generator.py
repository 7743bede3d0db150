"""Prompts and published weights in, a `GenerationResult` out; computed by vLLM's own engine in this process.

update_weights ──► the model's own loaders, in place ──► digest over what the model multiplies with
stream ──► one request per row ──► engine step ──► rows that ended ──► prompts whose rows have all ended ──► caller
                                   └── repeated until nothing is left; rows that ended make room for waiting ones ──┘

Two threads may use a generator: one completes prompts, the other loads weights between two steps. Rows that are being
completed then go on with the new weights. (In a tied group all ranks have to take the same steps, so there one thread
does both.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import vllm
from vllm import EngineArgs, SamplingParams
from vllm.inputs import tokens_input
from vllm.model_executor.models import ModelRegistry
from vllm.sampling_params import RequestOutputKind
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from nemo_rl.errors import ModelError, WeightSyncError
from nemo_rl.models import onednn
from nemo_rl.models.generation.config import GenerationConfig, SamplingConfig
from nemo_rl.models.generation.interfaces import GenerationResult
from nemo_rl.models.generation.prompts import check_prompt_lengths
from nemo_rl.models.generation.results import Completion, make_result
from nemo_rl.models.generation.sampling import Sampler
from nemo_rl.models.generation.stop import StopRules, end_of_sequence_ids
from nemo_rl.models.generation.vllm.config import VllmOptions
from nemo_rl.models.generation.vllm.draws import ROW, Draws, RowSampler
from nemo_rl.models.generation.vllm.engine import SharedEngine, explained
from nemo_rl.models.generation.vllm.executor import TiedGroup, tied_executor
from nemo_rl.models.generation.vllm.weights import OwnTensors, ReadBack, keep_plain_weights
from nemo_rl.models.weights.digest import check_digest
from nemo_rl.models.weights.interfaces import WeightStream, WeightUpdate
from nemo_rl.models.weights.receiver import receive
from nemo_rl.models.weights.transports import make_transport

_MIN_BATCHED_TOKENS = 8192
_GIB = 1024**3


@dataclass(frozen=True)
class _Call:
    """What one call of `stream` asks for.

    Attributes:
        prompts: tokens of each prompt.
        num_generations: rows per prompt, which follow one another.
        first_prompt: position of the first prompt in the whole call, of which this may be a part.
        seed: of the draws.
        sampler: how tokens are drawn.
    """

    prompts: list[list[int]]
    num_generations: int
    first_prompt: int
    seed: int
    sampler: Sampler

    @property
    def num_rows(self) -> int:
        return len(self.prompts) * self.num_generations


@dataclass(frozen=True)
class _Row:
    """One completed row of a call: its index, what it is, and the version of the weights that drew its first token."""

    index: int
    completion: Completion
    weights_version: int


class VllmGenerator:
    """Completes prompts with one model in this process, or with one part of it in each process of a tied group.

    `environment.export_vllm_variables` comes before the import of this module.
    """

    def __init__(
        self,
        model_name: str,
        config: GenerationConfig,
        *,
        max_sequence_length: int,
        tokenizer_name: str | None = None,
        precision: str = "float32",
        use_gpu: bool = False,
        tied_group: TiedGroup | None = None,
        name: str = "the generator",
    ) -> None:
        """Start the engine with arbitrary weights; real ones come with `update_weights`.

        Args:
            model_name: Hugging Face directory or hub name.
            config: how to sample and when to stop; its options are `VllmOptions`.
            max_sequence_length: longest prompt plus completion, in tokens.
            tokenizer_name: where the tokenizer comes from; None: the model's own.
            precision: "float32" or "bfloat16"; `config.precision` wins.
            use_gpu: compute on the GPU that this process sees.
            tied_group: this process's place among those that hold the model together; None: it holds all of it.
            name: of this generator, for messages.

        Raises:
            ModelError: configuration or tokenizer cannot be read, or vLLM does not take the model.
        """
        from transformers import AutoConfig, AutoTokenizer

        try:
            model_config = AutoConfig.from_pretrained(model_name)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_name or model_name)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read the model {model_name!r}: {error}") from error
        self.name = name
        self.config = config
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.precision = config.precision or precision
        self.max_sequence_length = max_sequence_length
        self.version: int | None = None
        stop_ids = set(config.stop_token_ids) | end_of_sequence_ids(model_config, self.tokenizer)
        self._stop = StopRules(self.tokenizer, stop_ids, config.stop_strings)
        if not use_gpu:
            onednn.warn_if_emulated("cpu", getattr(torch, self.precision))
            keep_plain_weights()
            _check_head_size(model_name, model_config)
        _inspect_here(model_config.architectures or [])
        arguments = self._engine_args(model_name, tokenizer_name or model_name, tied_group)
        try:
            self.engine = SharedEngine(arguments)
        except (ValueError, NotImplementedError, RuntimeError, AssertionError) as error:
            why = explained(error, on_cpu=not use_gpu)
            raise ModelError(f"vLLM {vllm.__version__} does not take the model {model_name!r}: {why}") from error
        self._own = OwnTensors(self.engine.model)
        self._was_read_as_a_whole = False
        self._row_sampler = _row_sampler(self.engine.worker)
        self._num_calls = 0

    def _engine_args(self, model_name: str, tokenizer_name: str, tied_group: TiedGroup | None) -> EngineArgs:
        options, on_cpu = self.config.options, self.device.type == "cpu"
        assert isinstance(options, VllmOptions)
        max_num_seqs = options.max_num_seqs or self.config.max_batch_size
        return EngineArgs(
            model=model_name,
            runner="generate",
            tokenizer=tokenizer_name,
            # Only stop strings, and requests from outside, need text.
            skip_tokenizer_init=not self._stop.strings and options.http_port is None,
            dtype=self.precision,
            load_format="dummy",
            generation_config="vllm",
            max_model_len=self.max_sequence_length,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens or max(_MIN_BATCHED_TOKENS, max_num_seqs),
            enable_prefix_caching=options.enable_prefix_caching,
            enforce_eager=on_cpu if options.enforce_eager is None else options.enforce_eager,
            kv_cache_memory_bytes=int(options.cpu_kv_cache_gib * _GIB) if on_cpu else None,
            gpu_memory_utilization=options.gpu_memory_utilization,
            enable_sleep_mode=options.enable_sleep_mode and not on_cpu,
            logits_processors=[RowSampler],
            tensor_parallel_size=1 if tied_group is None else tied_group.size,
            distributed_executor_backend="uni" if tied_group is None else tied_executor(tied_group),
            # Ranks see one GPU each, and vLLM's own all-reduce needs to see all.
            disable_custom_all_reduce=tied_group is not None,
            # One step after the other, so that weights can change between two of them.
            async_scheduling=False,
            disable_log_stats=True,
        )

    # --- weights -----------------------------------------------------------------------------------------------------

    def update_weights(self, update: WeightUpdate | WeightStream) -> str:
        """Load weights in place. Returns the digest over the memory that the engine multiplies with.

        That is read back bucket by bucket, as they are loaded; after the first update also once more as a whole, which
        would find a loader that writes over what another one wrote.

        Raises:
            WeightSyncError: they arrived damaged, or not all of them were loaded: nothing can be generated until the
                next update succeeds. Or they are another model's: if they were published, the old ones stay.
        """
        if isinstance(update, WeightUpdate):
            self._own.check([spec for bucket in update.buckets for spec in bucket.tensors])
        with self.engine.turn():
            self.version = None
            loaded = ReadBack(self._own, on_gpu=make_transport(update.transport).on_gpu)
            weights = receive(update, device=self.device, verify=False, on_loaded=loaded.read)
            with contextlib.closing(weights):
                self.engine.model.load_weights(self._own.checked(weights))
            if not self.engine.forget_keys_and_values():
                raise WeightSyncError(f"{self.name} still holds keys and values from before version {update.version}")
            digest = loaded.digest(as_a_whole=not self._was_read_as_a_whole)
            check_digest(version=update.version, expected=weights.digest, found=digest, where=self.name)
            self._was_read_as_a_whole = True
            self.version = update.version
            if self._row_sampler.draws is not None:
                self._row_sampler.draws.weights_version = update.version
        return digest

    def check_has_weights(self) -> None:
        """Raise `WeightSyncError` unless the last update succeeded."""
        if self.version is None:
            raise WeightSyncError(f"{self.name} has no weights: call update_weights before generate")

    def sleep(self, level: int) -> None:
        """Give a GPU's memory back: 1 keeps the weights in host memory, 2 drops them, keys and values go in any case.

        On CPUs, and when sleep mode is off, nothing happens.
        """
        if self._can_sleep:
            with self.engine.turn():
                self.engine.forget_keys_and_values()
                self.engine.llm.sleep(level)
                if level == 2:
                    self.version = None

    def wake(self, tags: Sequence[str] | None = None) -> None:
        """Take memory again: "weights", "kv_cache", or None for both. After level 2 weights must be loaded anew."""
        if self._can_sleep:
            with self.engine.turn():
                self.engine.llm.wake_up(None if tags is None else list(tags))

    @property
    def _can_sleep(self) -> bool:
        return bool(self.engine.llm.model_config.enable_sleep_mode)

    # --- completions -------------------------------------------------------------------------------------------------

    def generate(self, input_ids: torch.Tensor, input_lengths: torch.Tensor, **how: Any) -> GenerationResult:
        """Complete prompts; takes what `stream` takes, and returns all results in the order of the prompts."""
        call = self._call(input_ids, input_lengths, **how)
        return self._result(call, [row for ended in self._decode(call) for row in ended])

    def stream(
        self, input_ids: torch.Tensor, input_lengths: torch.Tensor, **how: Any
    ) -> Iterator[tuple[list[int], GenerationResult]]:
        """Complete prompts, and hand each over as soon as all its completions have ended.

        Args:
            input_ids: [N, P] int64, padded on the right.
            input_lengths: [N] int64.
            how: `seed`, `num_generations`, `greedy`, `sampling` as in `GenerationInterface.generate`, and
                `first_prompt`, the position of the first of these prompts in the whole call, of which they are a part.

        Yields:
            Positions of prompts in the whole call, and their completions in that order. What has not ended when the
            caller stops iterating is dropped.
        """
        call = self._call(input_ids, input_lengths, **how)
        rows_of: dict[int, list[_Row]] = {}
        for ended in self._decode(call):
            complete = []
            for row in ended:
                prompt = row.index // call.num_generations
                rows_of.setdefault(prompt, []).append(row)
                if len(rows_of[prompt]) == call.num_generations:
                    complete.append(prompt)
            if complete:
                rows = [row for prompt in complete for row in rows_of.pop(prompt)]
                yield [call.first_prompt + prompt for prompt in sorted(complete)], self._result(call, rows)

    def _call(
        self,
        input_ids: torch.Tensor,
        input_lengths: torch.Tensor,
        *,
        seed: int,
        num_generations: int = 1,
        greedy: bool = False,
        sampling: SamplingConfig | None = None,
        first_prompt: int = 0,
    ) -> _Call:
        lengths: list[int] = input_lengths.tolist()
        check_prompt_lengths(lengths, self.max_sequence_length, first_prompt)
        prompts = [row[:length] for row, length in zip(input_ids.tolist(), lengths, strict=True)]
        return _Call(prompts, num_generations, first_prompt, seed, Sampler(sampling or self.config, greedy=greedy))

    def _decode(self, call: _Call) -> Iterator[list[_Row]]:
        """Complete all rows of a call; yields those that ended, as they do."""
        self._num_calls += 1
        requests = [f"call {self._num_calls}, row {row}" for row in range(call.num_rows)]
        ended: list[_Row] = []
        try:
            with self.engine.turn():
                draws = self._start_draws(call)
                for row, request in enumerate(requests):
                    prompt = call.prompts[row // call.num_generations]
                    listener = functools.partial(_note_row, ended, draws, row)
                    self.engine.add(request, tokens_input(prompt), self._request_params(row, len(prompt)), listener)
            num_left = call.num_rows
            while num_left:
                with self.engine.turn():
                    self.check_has_weights()
                    self.engine.step()
                    news = ended.copy()
                    ended.clear()
                num_left -= len(news)
                if news:
                    yield news
        finally:
            with self.engine.turn():
                self.engine.cancel(requests)
                self._row_sampler.draws = None

    def _start_draws(self, call: _Call) -> Draws:
        self.check_has_weights()
        assert self.version is not None
        self._row_sampler.draws = Draws(
            seed=call.seed,
            first_row=call.first_prompt * call.num_generations,
            num_rows=call.num_rows,
            num_tokens=self.config.max_new_tokens,
            sampler=call.sampler,
            weights_version=self.version,
            device=self.device,
        )
        return self._row_sampler.draws

    def _request_params(self, row: int, prompt_length: int) -> SamplingParams:
        return SamplingParams(
            temperature=0.0,  # takes the only token that `RowSampler` leaves
            max_tokens=min(self.config.max_new_tokens, self.max_sequence_length - prompt_length),
            stop=list(self._stop.strings),
            stop_token_ids=sorted(self._stop.token_ids),
            include_stop_str_in_output=True,
            detokenize=bool(self._stop.strings),
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={ROW: row},
            skip_clone=True,
        )

    def _result(self, call: _Call, rows: list[_Row]) -> GenerationResult:
        rows = sorted(rows, key=lambda row: row.index)
        return make_result(
            [call.prompts[row.index // call.num_generations] for row in rows],
            [row.completion for row in rows],
            tokenizer=self.tokenizer,
            weights_version=min((row.weights_version for row in rows), default=self.version or 0),
            where=self.name,
        )

    def attestation(self) -> dict[str, Any]:
        """What this generator computes with."""
        options = self.config.options
        assert isinstance(options, VllmOptions)
        return {
            "engine": f"vLLM {vllm.__version__}",
            "precision": self.precision,
            "device": str(self.device),
            "tensor_parallel_size": options.tensor_parallel_size,
        }

    def shutdown(self) -> None:
        """Stop the engine; the generator cannot be used afterwards."""
        self.engine.shutdown()


def _note_row(ended: list[_Row], draws: Draws, row: int, output: Any) -> None:
    """What the engine tells of a row when it has ended."""
    [completed] = output.outputs
    tokens = torch.tensor(completed.token_ids, dtype=torch.int64)
    logprobs, sampling_logprobs = draws.logprobs(row, len(tokens))
    completion = Completion(tokens, logprobs, sampling_logprobs, truncated=completed.finish_reason == "length")
    ended.append(_Row(row, completion, draws.first_versions[row]))


def _inspect_here(architectures: list[str]) -> None:
    """Let vLLM look at the model's class in this process, where it is imported anyway.

    By default it starts another one for that, which imports vLLM once more: the first start would take twice as long.
    """
    for architecture in architectures:
        known = ModelRegistry.models.get(architecture)
        if known is not None:
            ModelRegistry.register_model(architecture, known.load_model_cls())


def _check_head_size(model_name: str, config: Any) -> None:
    """Raise `ModelError` for what vLLM's attention on CPUs would refuse at the first prompt."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not CPUAttentionBackend.supports_head_size(size):
        raise ModelError(
            f"the model {model_name!r} has attention heads of size {size}; on CPUs, vLLM knows "
            f"{CPUAttentionBackend.get_supported_head_sizes()}. Set policy.generation.backend=torch."
        )


def _row_sampler(worker: Any) -> RowSampler:
    [sampler] = [
        processor for processor in worker.model_runner.input_batch.logitsprocs.all if isinstance(processor, RowSampler)
    ]
    return sampler
