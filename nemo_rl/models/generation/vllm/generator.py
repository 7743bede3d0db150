"""The generator of the vLLM backend: vLLM's own engine in this process.

update_weights ──► the model's own loaders, in place ──► digest over the memory that the model computes with
stream ──► one request per row ──► engine step ──► rows that ended ──► prompts whose rows have all ended ──► caller
                                   └── repeated until no row is left; rows that ended make room for waiting rows ──┘

Several threads may call a generator: the rows of all running calls are in the same batches. Weights are loaded between
two steps, and running rows continue with them. (In a tied group all ranks must take the same steps: one call at a
time.)
"""

from __future__ import annotations

import contextlib
import gc
import queue
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
from nemo_rl.models.generation.generator import Generator, GeneratorSpec
from nemo_rl.models.generation.interfaces import GenerationRequest, GenerationResult
from nemo_rl.models.generation.results import Completion, make_result
from nemo_rl.models.generation.sampling import Sampler
from nemo_rl.models.generation.vllm.config import VllmOptions, attention_head_size
from nemo_rl.models.generation.vllm.draws import ROW, Draws, JobRow
from nemo_rl.models.generation.vllm.engine import SharedEngine, start_error
from nemo_rl.models.generation.vllm.executor import TiedGroup, tied_executor
from nemo_rl.models.generation.vllm.experts import keep_plain_experts
from nemo_rl.models.generation.vllm.row_sampler import RowSampler
from nemo_rl.models.generation.vllm.weights import LocalParameters, ReadBack, keep_plain_weights
from nemo_rl.models.weights.adapters import ReceivedBase
from nemo_rl.models.weights.incoming import IncomingWeights
from nemo_rl.models.weights.interfaces import WeightStream, WeightUpdate
from nemo_rl.models.weights.receiver import receive

_MIN_BATCHED_TOKENS = 8192
_GIB = 1024**3


@dataclass(frozen=True)
class _Row:
    """One completed row of a request.

    Attributes:
        index: Position among the rows of the request.
        completion: The completion.
        weights_version: Version of the weights that drew its first token.
    """

    index: int
    completion: Completion
    weights_version: int


class _Call:
    """A running call. The engine's thread reports the rows that have ended, the caller's thread takes them.

    Attributes:
        draws: Draws the tokens of its rows.
        rows: The rows that have not ended, by the id of the engine's request.
    """

    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self.rows: dict[str, JobRow] = {}
        self._reports: queue.SimpleQueue[list[_Row] | Exception] = queue.SimpleQueue()

    def on_step(self, outputs: list[Any] | Exception) -> None:
        """Receive the outputs of a step. vLLM returns those of rows that have ended."""
        if isinstance(outputs, Exception):
            self.fail(outputs)
        else:
            self._reports.put([_completed_row(self.rows.pop(output.request_id), output) for output in outputs])

    def fail(self, error: Exception) -> None:
        """Let the caller's thread raise an error."""
        self._reports.put(error)

    def next_rows(self) -> list[_Row]:
        """Wait until a step ends rows of this call; returns them."""
        report = self._reports.get()
        if isinstance(report, Exception):
            raise report
        return report


class VllmGenerator(Generator):
    """Completes prompts with vLLM: one model in this process, or one part of it in each process of a tied group.

    Call `environment.export_vllm_variables` before you import this module.

    Args:
        spec: Which model, and how to sample; `spec.config.options` are `VllmOptions`.
        tied_group: This process's place among those that hold the model together. None: it holds the whole model.

    Raises:
        ModelError: Configuration or tokenizer cannot be read, or vLLM does not support the model.
    """

    def __init__(self, spec: GeneratorSpec, tied_group: TiedGroup | None = None) -> None:
        super().__init__(spec)
        assert isinstance(spec.config.options, VllmOptions)
        self.options: VllmOptions = spec.config.options
        self._is_leader = tied_group is None or tied_group.rank == 0
        if not spec.use_gpu:
            onednn.warn_if_emulated("cpu", getattr(torch, spec.precision))
            keep_plain_weights()
            keep_plain_experts()
            _check_head_size(spec.model_name, self.model_config)
        _inspect_in_process(self.model_config.architectures or [])
        # While it starts, the engine collects garbage five times. Each time takes a quarter of a second if Python looks
        # at the objects of all modules again.
        gc.freeze()
        try:
            self.engine = SharedEngine(self._engine_args(tied_group))
        except (ValueError, NotImplementedError, RuntimeError, AssertionError) as error:
            raise ModelError(
                f"vLLM {vllm.__version__} does not start with the model {spec.model_name!r}: "
                f"{start_error(error, on_cpu=not spec.use_gpu)}"
            ) from error
        self._parameters = LocalParameters(self.engine.model)
        self._read_back_all = True  # at the first update
        self._base = ReceivedBase()
        self._calls: set[_Call] = set()  # that run; to be used in a turn of the engine

    def _engine_args(self, tied_group: TiedGroup | None) -> EngineArgs:
        spec, options, on_cpu = self.spec, self.options, not self.spec.use_gpu
        max_num_seqs = options.max_num_seqs or spec.config.max_batch_size
        return EngineArgs(
            model=spec.model_name,
            runner="generate",
            tokenizer=spec.tokenizer_name or spec.model_name,
            # Only stop strings and HTTP requests need text.
            skip_tokenizer_init=not self.stop.strings and options.http_port is None,
            dtype=spec.precision,
            load_format="dummy",
            generation_config="vllm",
            max_model_len=spec.max_sequence_length,
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
            # Each rank sees one GPU, but vLLM's own all-reduce needs to see all of them.
            disable_custom_all_reduce=tied_group is not None,
            # Other kernels for experts rearrange the weights after loading, which later loads would not do.
            moe_backend="auto" if on_cpu else "triton",
            # One step at a time, so that weights can change between two steps.
            async_scheduling=False,
            disable_log_stats=True,
        )

    # --- weights -----------------------------------------------------------------------------------------------------

    def update_weights(self, update: WeightUpdate | WeightStream) -> str:
        """Load weights in place; returns the digest over the memory that the engine computes with.

        The memory is read back bucket by bucket, as the buckets are loaded. After the first update all of it is read
        back once more: this would detect a loader that overwrites what another loader wrote. After that it is known
        which memory holds which parameter, and streams between CPUs are written there without vLLM's loaders.

        Raises:
            WeightSyncError: The weights arrived damaged or incomplete: nothing can be generated until an update
                succeeds. Or they belong to another model: the old weights stay if these were published.
        """
        if isinstance(update, WeightUpdate):
            self._parameters.check(update.tensors)
        with self.engine.turn():
            self._set_version(None)
            try:
                return self._load(update)
            except BaseException:
                for call in self._calls:
                    call.fail(WeightSyncError(f"{self.spec.name} lost its weights: an update during the call failed"))
                raise

    def _load(self, update: WeightUpdate | WeightStream) -> str:
        if isinstance(update, WeightStream) and (memory := self._writable_memory()):
            weights, digest = self._write(update, memory)
        else:
            weights, digest = self._load_by_vllm(update)
        if not self.engine.drop_keys_and_values():
            raise WeightSyncError(f"{self.spec.name} still holds keys and values from before version {update.version}")
        digest = weights.confirm(digest, where=self.spec.name)
        self._read_back_all = False
        self._set_version(update.version)
        for call in self._calls:
            call.draws.weights_version = update.version
        return digest

    def _writable_memory(self) -> dict[str, torch.Tensor]:
        """Return the parameters that streams may be written to, as they are in the engine now; empty if none may."""
        may_write = not self.spec.use_gpu and not self._read_back_all
        return self._parameters.contiguous(self.engine.model) if may_write else {}

    def _load_by_vllm(self, update: WeightUpdate | WeightStream) -> tuple[IncomingWeights, str]:
        """Load weights by vLLM's loaders; return them with the digest of the memory read back."""
        weights = receive(
            update, device=self.spec.device, verify=False, on_loaded=lambda specs: loaded.read(specs), base=self._base
        )
        loaded = ReadBack(self._parameters, on_gpu=weights.digests_on_gpu)
        with contextlib.closing(weights):
            self.engine.model.load_weights(self._parameters.checked(weights))
        return weights, loaded.digest(again=self._read_back_all)

    def _write(self, update: WeightStream, memory: dict[str, torch.Tensor]) -> tuple[IncomingWeights, str]:
        """Write weights to the engine's `memory` as they arrive; return them with the digest of that memory."""
        weights = receive(update, device=self.spec.device, verify=False, into=memory)
        names, rest = [], []
        with contextlib.closing(weights):
            for name, tensor in self._parameters.checked(weights):
                names.append(name)
                if tensor is not memory.get(name):
                    rest.append((name, tensor))
            if rest:
                self.engine.model.load_weights(rest)
        self._parameters.check_names(names)
        return weights, weights.digest_of(self._parameters.gather(names))

    def _set_version(self, version: int | None) -> None:
        self.version = version
        self.engine.set_loaded(version is not None)

    def sleep(self, level: int = 1) -> None:
        """Release GPU memory. Level 1 keeps the weights in host memory, level 2 drops them; the KV cache is dropped.

        Running calls and requests of HTTP clients wait until `wake`, after level 2 also for the next weights. On CPUs,
        and when sleep mode is off, this does nothing.
        """
        if self._can_sleep:
            with self.engine.turn():
                self.engine.sleep(level)
                if level == 2:
                    self._set_version(None)

    def wake(self, tags: Sequence[str] | None = None) -> None:
        """Allocate "weights", "kv_cache" or, with None, both again. After level 2, load weights again."""
        if self._can_sleep:
            with self.engine.turn():
                self.engine.wake(None if tags is None else list(tags))

    @property
    def _can_sleep(self) -> bool:
        return bool(self.engine.llm.model_config.enable_sleep_mode)

    # --- completions -------------------------------------------------------------------------------------------------

    def generate(self, request: GenerationRequest) -> GenerationResult:
        rows = [row for ended in self._decode(request) for row in ended]
        return self._result(request.prompts(), request.num_generations, rows)

    def stream(self, request: GenerationRequest) -> Iterator[tuple[list[int], GenerationResult]]:
        """Complete prompts, and yield each as soon as all its completions have ended.

        In a tied group only rank 0 yields. Rows that have not ended when the caller stops iterating are cancelled.
        """
        prompts, count = request.prompts(), request.num_generations
        rows_of: dict[int, list[_Row]] = {}
        for ended in self._decode(request):
            complete = []
            for row in ended:
                prompt = row.index // count
                rows_of.setdefault(prompt, []).append(row)
                if len(rows_of[prompt]) == count:
                    complete.append(prompt)
            if complete:
                rows = [row for prompt in complete for row in rows_of.pop(prompt)]
                if self._is_leader:
                    positions = [request.first_prompt + prompt for prompt in sorted(complete)]
                    yield positions, self._result(prompts, count, rows)

    def _decode(self, request: GenerationRequest) -> Iterator[list[_Row]]:
        """Complete all rows of a request; yield the rows that a step ends."""
        request.check_prompt_lengths(self.spec.max_sequence_length)
        rows = [prompt for prompt in request.prompts() for _ in range(request.num_generations)]
        sampler = Sampler(request.sampling or self.spec.config, greedy=request.greedy)
        call = _Call(Draws(request, num_tokens=self.spec.config.max_new_tokens, sampler=sampler))
        try:
            with self.engine.turn():  # a single one: the ranks of a tied group must have the same rows at each step
                call.draws.weights_version = self._ready_version()
                self._calls.add(call)
                for index, prompt in enumerate(rows):
                    row = JobRow(call.draws, index)
                    params = self._request_params(row, len(prompt))
                    call.rows[self.engine.add(tokens_input(prompt), params, call.on_step)] = row
            num_live = len(rows)
            while num_live:
                ended = call.next_rows()
                num_live -= len(ended)
                yield ended
        finally:
            with self.engine.turn():
                self.engine.cancel(call.rows)
                self._calls.discard(call)

    def _ready_version(self) -> int:
        """Return the version of the weights. Raises `WeightSyncError` if no call is possible now."""
        version = self.weights_version()
        if self.engine.is_asleep:
            raise WeightSyncError(f"{self.spec.name} is asleep: call wake before generate")
        return version

    def _request_params(self, row: JobRow, prompt_length: int) -> SamplingParams:
        return SamplingParams(
            temperature=0.0,  # takes the only token that `RowSampler` leaves
            max_tokens=min(self.spec.config.max_new_tokens, self.spec.max_sequence_length - prompt_length),
            stop=list(self.stop.strings),
            stop_token_ids=sorted(self.stop.token_ids),
            include_stop_str_in_output=True,
            detokenize=bool(self.stop.strings),
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={ROW: row},
            skip_clone=True,
        )

    def _result(self, prompts: list[list[int]], num_generations: int, rows: list[_Row]) -> GenerationResult:
        rows = sorted(rows, key=lambda row: row.index)
        return make_result(
            [prompts[row.index // num_generations] for row in rows],
            [row.completion for row in rows],
            tokenizer=self.tokenizer,
            weights_version=min((row.weights_version for row in rows), default=self.version or 0),
            where=self.spec.name,
        )

    def attestation(self) -> dict[str, Any]:
        return {
            **super().attestation(),
            "engine": f"vLLM {vllm.__version__}",
            "tensor_parallel_size": self.options.tensor_parallel_size,
        }

    def shutdown(self) -> None:
        with self.engine.turn():
            self.engine.shutdown()


def _completed_row(row: JobRow, output: Any) -> _Row:
    """Make the result of a row from the output that vLLM returns when the row ends."""
    [completed] = output.outputs
    tokens = torch.tensor(completed.token_ids, dtype=torch.int64)
    logprobs, sampling_logprobs = row.draws.logprobs(row.index, len(tokens))
    completion = Completion(tokens, logprobs, sampling_logprobs, truncated=completed.finish_reason == "length")
    return _Row(row.index, completion, row.draws.first_versions[row.index])


def _inspect_in_process(architectures: list[str]) -> None:
    """Let vLLM inspect the model's class in this process, which imports it anyway.

    By default vLLM inspects it in a subprocess that imports vLLM again, which doubles the time of the first start.
    """
    for architecture in architectures:
        known = ModelRegistry.models.get(architecture)
        if known is not None:
            ModelRegistry.register_model(architecture, known.load_model_cls())


def _check_head_size(model_name: str, config: Any) -> None:
    """Raise `ModelError` for a head size that vLLM's attention on CPUs would reject only at the first prompt."""
    size = attention_head_size(config.get_text_config())
    if size is not None and not CPUAttentionBackend.supports_head_size(size):
        raise ModelError(
            f"the model {model_name!r} has attention heads of size {size}; on CPUs, vLLM supports "
            f"{CPUAttentionBackend.get_supported_head_sizes()}. Set policy.generation.backend=torch."
        )
