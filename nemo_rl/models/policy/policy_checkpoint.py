"""Checkpoints of a policy, in safetensors and JSON. No file is pickled.

::

    <directory>/
      model/                    a Hugging Face model in float32 with its tokenizer: from_pretrained() loads it
      optimizer-00000.safetensors, ...   "<parameter>/exp_avg", "<parameter>/exp_avg_sq", "<parameter>/step"
      adapter/                  with LoRA, the adapters: peft loads them
      rng.safetensors           "<rank>/<generator>"
      trainer.json              optimizer steps, world size, names and shapes of the parameters

Tensors are saved unsharded: rank 0 gathers and writes them one by one. So a checkpoint depends neither on the backend
nor on the number of workers and their sharding, and only rank 0 accesses the directory. The learning rate is a function
of the number of optimizer steps. Random states are restored if the number of workers is the same.

Writing is not atomic: the caller passes a temporary directory and renames it afterwards.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from nemo_rl.errors import CheckpointError, ModelError
from nemo_rl.models.policy.hf_loading import load_config, load_model, load_tokenizer
from nemo_rl.models.policy.optimizer import STATE_KEYS, PolicyOptimizer
from nemo_rl.models.policy.parallel_model import ParallelModel, TensorReader
from nemo_rl.models.policy.process_group import ProcessGroup, capture_random_state, restore_random_state

logger = logging.getLogger(__name__)

FORMAT = 1
MODEL_DIRECTORY = "model"
TRAINER_FILE = "trainer.json"
RNG_FILE = "rng.safetensors"
OPTIMIZER_FILES = "optimizer-*.safetensors"
# Rank 0 holds one file of optimizer state in memory at a time.
MAX_FILE_BYTES = 4 * 2**30


class TrainedState(Protocol):
    """Gives access to a model and its optimizer as full tensors with Hugging Face names, for any sharding.

    Attributes:
        num_steps: optimizer steps taken.
    """

    num_steps: int

    @property
    def module(self) -> PreTrainedModel:
        """The Hugging Face model, saved except for its tensors, which may be shards or on the meta device."""

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and full shapes of the parameters in the model's order, tied ones once."""

    @property
    def optimizer_keys(self) -> list[str]:
        """ "<parameter>/<name of a moment>" for all of the optimizer's state."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield float32 parameters, gathered one at a time, at least on rank 0. A collective: exhaust it."""

    def served_weights(self, *, on_all_ranks: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the weights in the model's compute dtype, on rank 0 or on all ranks. A collective: exhaust it."""

    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the optimizer's state by `optimizer_keys`, at least on rank 0. A collective: exhaust it."""

    def load(self, weight: TensorReader | None, moment: TensorReader | None) -> None:
        """Load weights by name and moments by key with rank 0's readers (None on other ranks). A collective."""

    def extra_files(self) -> Callable[[Path], None]:
        """Return what writes further files into a checkpoint on rank 0. A collective."""


def save(directory: Path, state: TrainedState, group: ProcessGroup, tokenizer_name: str) -> None:
    """Create `directory` and write a checkpoint into it. A collective; all ranks return after it is written.

    Raises:
        CheckpointError: rank 0 cannot write.
    """
    writes = group.rank == 0
    error: str | None = None
    # An error on rank 0 must not stop gathering, because the other ranks wait in it.
    gathered = {name: tensor.cpu() for name, tensor in state.weights() if writes}
    random_states = _gather_random_states(group)
    write_extra_files = state.extra_files()
    try:
        if writes:
            directory.mkdir(parents=True, exist_ok=True)
            _write_model(directory / MODEL_DIRECTORY, state, gathered, tokenizer_name)
            write_extra_files(directory)
            save_file(random_states, directory / RNG_FILE)
            _write_trainer(directory / TRAINER_FILE, state, group)
    except (OSError, SafetensorError) as failure:
        error = str(failure)
    del gathered
    for index, tensors in enumerate(_optimizer_files(state, keep=writes)):
        try:
            if writes and error is None:
                save_file(tensors, directory / OPTIMIZER_FILES.replace("*", f"{index:05d}"))
        except (OSError, SafetensorError) as failure:
            error = str(failure)
    agree(group, error, f"cannot write the checkpoint {directory}")


def load(directory: Path, state: TrainedState, group: ProcessGroup) -> None:
    """Restore what `save` wrote, under any backend and layout. A collective.

    Raises:
        CheckpointError: on every rank: the checkpoint is missing, damaged, or of another model. Nothing has changed.
    """
    reads = group.rank == 0
    error: str | None = None
    trainer: dict[str, Any] = {}
    source: _Source | None = None
    if reads:
        try:
            trainer = read_trainer(directory / TRAINER_FILE, state.shapes)
            source = _Source(directory, state)
        except (CheckpointError, ModelError, OSError, SafetensorError, KeyError, ValueError) as failure:
            error = str(failure)
    agree(group, error, f"cannot load the checkpoint {directory}")
    state.load(source.parameter if source else None, source.moment if source else None)
    num_steps, world_size = group.sum([float(trainer.get("num_steps", 0)), float(trainer.get("world_size", 0))])
    state.num_steps = int(num_steps)
    if int(world_size) == group.world_size:
        _scatter_random_states(source.random_states() if source else None, group)
    elif reads:
        logger.warning(
            "the checkpoint has the random states of %d workers, this policy has %d: they restart from the seed",
            world_size,
            group.world_size,
        )


class TorchState:
    """The `TrainedState` of the torch backend: a `ParallelModel` and its `PolicyOptimizer`."""

    def __init__(self, model: ParallelModel, optimizer: PolicyOptimizer) -> None:
        self._model = model
        self._optimizer = optimizer

    @property
    def module(self) -> PreTrainedModel:
        return self._model.module

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self._model.parameters().items()}

    @property
    def num_steps(self) -> int:
        return self._optimizer.num_steps

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        self._optimizer.num_steps = value

    @property
    def optimizer_keys(self) -> list[str]:
        return [f"{name}/{key}" for name in self._optimizer.names for key in STATE_KEYS]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._model.full_tensors()

    def served_weights(self, *, on_all_ranks: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        return self._model.full_tensors()

    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self._optimizer.names:
            for key, state in self._optimizer.state(name).items():
                yield f"{name}/{key}", self._model.full(state)

    def load(self, weight: TensorReader | None, moment: TensorReader | None) -> None:
        self._model.load_full_tensors(weight)
        self._load_moments(moment)

    def extra_files(self) -> Callable[[Path], None]:
        return lambda directory: None

    def _load_moments(self, moment: TensorReader | None) -> None:
        with torch.no_grad():
            for name in self._optimizer.names:
                for key, state in self._optimizer.state(name).items():
                    saved = None if moment is None else moment(f"{name}/{key}").view(state.shape)
                    self._model.copy_from_rank_0(state, saved)


class _Source:
    """Reads a checkpoint on rank 0. The constructor checks that it is complete."""

    def __init__(self, directory: Path, state: TrainedState) -> None:
        path = str(directory / MODEL_DIRECTORY)
        saved = load_model(path, load_config(path, state.module.config._attn_implementation))
        self._parameters = {name: parameter.detach() for name, parameter in saved.named_parameters()}
        self._files: dict[str, Any] = {}
        for file in sorted(directory.glob(OPTIMIZER_FILES)):
            opened = safe_open(file, framework="pt")
            self._files.update(dict.fromkeys(opened.keys(), opened))
        self._rng = safe_open(directory / RNG_FILE, framework="pt")
        missing = sorted(set(state.optimizer_keys) - self._files.keys())
        missing = missing or sorted(state.shapes.keys() - self._parameters.keys())
        if missing:
            raise CheckpointError(f"it lacks {len(missing)} tensors, such as {missing[0]}")

    def parameter(self, name: str) -> torch.Tensor:
        return self._parameters[name]

    def moment(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[key].get_tensor(key)
        return tensor

    def random_states(self) -> dict[str, torch.Tensor]:
        return {key: self._rng.get_tensor(key) for key in self._rng.keys()}  # noqa: SIM118 - not a dict


def _write_model(path: Path, state: TrainedState, tensors: dict[str, torch.Tensor], tokenizer_name: str) -> None:
    state.module.save_pretrained(path, state_dict=tensors, max_shard_size="4GB")
    try:
        load_tokenizer(tokenizer_name).save_pretrained(path)
    except ModelError as error:
        logger.warning("the checkpoint is written without a tokenizer: %s", error)


def _write_trainer(path: Path, state: TrainedState, group: ProcessGroup) -> None:
    content = {
        "format": FORMAT,
        "num_steps": state.num_steps,
        "world_size": group.world_size,
        "parameters": {name: list(shape) for name, shape in state.shapes.items()},
    }
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_trainer(path: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Read the `TRAINER_FILE` of a checkpoint for a model with parameters of these shapes.

    Raises:
        CheckpointError: it is of another model, or of another version of this package.
        OSError, ValueError: it cannot be read.
    """
    trainer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if trainer.get("format") != FORMAT:
        raise CheckpointError(
            f"{path.name} has the format {trainer.get('format')!r}; this version reads format {FORMAT}"
        )
    expected = {name: list(shape) for name, shape in shapes.items()}
    saved = trainer["parameters"]
    if saved != expected:
        name = min(name for name in expected.keys() | saved.keys() if expected.get(name) != saved.get(name))
        raise CheckpointError(
            f"it is of another model: {name} has the shape {saved.get(name, 'none')} in the checkpoint and "
            f"{expected.get(name, 'none')} in policy.model_name"
        )
    return trainer


def _optimizer_files(state: TrainedState, *, keep: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Gather the optimizer's full state and split it into files; they are empty unless `keep`. A collective."""
    tensors: dict[str, torch.Tensor] = {}
    num_bytes = 0
    for key, full in state.moments():
        if not keep:
            continue
        size = full.numel() * full.element_size()
        if tensors and num_bytes + size > MAX_FILE_BYTES:
            yield tensors
            tensors, num_bytes = {}, 0
        tensors[key] = full.cpu().contiguous()
        num_bytes += size
    yield tensors


def _gather_random_states(group: ProcessGroup) -> dict[str, torch.Tensor]:
    """Return the states of all ranks by "<rank>/<generator>", on all ranks. A collective."""
    result: dict[str, torch.Tensor] = {}
    for key, state in capture_random_state(group.device).items():
        states = [state]
        if group.world_size > 1:
            states = [torch.empty_like(state) for _ in range(group.world_size)]
            dist.all_gather(states, state)
        result.update({f"{rank}/{key}": state for rank, state in enumerate(states)})
    return result


def _scatter_random_states(states: dict[str, torch.Tensor] | None, group: ProcessGroup) -> None:
    """Restore each rank's states from rank 0's `states`. A collective."""
    restored: dict[str, torch.Tensor] = {}
    for key, current in capture_random_state(group.device).items():
        for rank in range(group.world_size):
            saved = None if states is None else states.get(f"{rank}/{key}")
            state = current.clone() if saved is None else saved
            if group.world_size > 1:
                dist.broadcast(state, src=0)
            if rank == group.rank:
                restored[key] = state
    restore_random_state(restored, group.device)


def agree(group: ProcessGroup, error: str | None, what: str) -> None:
    """Raise on every rank if rank 0 has an error. A collective."""
    if not group.sum([float(error is not None)])[0]:
        return
    raise CheckpointError(f"{what}: {error or 'rank 0 failed; see its error'}")
