"""What a policy keeps on disk, and how it comes back. No pickle anywhere: safetensors and JSON only.

::

    <directory>/
      model/                    a Hugging Face model in float32 with its tokenizer: from_pretrained() loads it
      optimizer-00000.safetensors, ...   "<parameter>/exp_avg", "<parameter>/exp_avg_sq", "<parameter>/step"
      rng.safetensors           "<rank>/<generator>"
      trainer.json              optimizer steps, world size, names and shapes of the parameters

Everything is in full form, whatever the backend and the sharding: rank 0 gathers tensor by tensor and writes, so a
checkpoint depends neither on the number of workers nor on how they share the model, and only rank 0 needs the
directory. The schedule is a function of the number of optimizer steps. Random states come back where the number of
workers is the same.

Writing is not atomic: the caller gives a directory that it renames when all is done.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
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
# Rank 0 holds one such file of optimizer state at a time.
MAX_FILE_BYTES = 4 * 2**30


class TrainedState(Protocol):
    """A model and its optimizer, however they are spread over ranks, in whole tensors with Hugging Face names.

    Attributes:
        num_steps: optimizer steps taken.
    """

    num_steps: int

    @property
    def module(self) -> PreTrainedModel:
        """The Hugging Face model; its tensors may be shards or have no values, the rest of it is saved."""

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the parameters in the model's order, tied ones once."""

    @property
    def optimizer_keys(self) -> list[str]:
        """ "<parameter>/<name of a moment>" of everything that the optimizer keeps."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters, float32, gathered one at a time; on rank 0 at least. A collective: exhaust it."""

    def served_weights(self, *, on_all_ranks: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights that the model computes with, in its dtype, on rank 0 or on all ranks; likewise."""

    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The optimizer's state by `optimizer_keys`, likewise."""

    def load(self, weight: TensorReader | None, moment: TensorReader | None) -> None:
        """Take over weights (by name) and moments (by key), which rank 0 reads. A collective."""


def save(directory: Path, state: TrainedState, group: ProcessGroup, tokenizer_name: str) -> None:
    """Write a checkpoint into `directory`, which is made. A collective; returns when it is written, on all ranks.

    Raises:
        CheckpointError: rank 0 cannot write.
    """
    writes = group.rank == 0
    error: str | None = None
    # On rank 0 an error must not stop the gathering, in which the other ranks wait.
    gathered = {name: tensor.cpu() for name, tensor in state.weights() if writes}
    random_states = _gather_random_states(group)
    try:
        if writes:
            directory.mkdir(parents=True, exist_ok=True)
            _write_model(directory / MODEL_DIRECTORY, state, gathered, tokenizer_name)
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
    _agree(group, error, f"cannot write the checkpoint {directory}")


def load(directory: Path, state: TrainedState, group: ProcessGroup) -> None:
    """Restore what `save` wrote, with whatever backend and layout. A collective.

    Raises:
        CheckpointError: on every rank; it is missing, damaged, or of another model. Then nothing has changed.
    """
    reads = group.rank == 0
    error: str | None = None
    trainer: dict[str, Any] = {}
    source: _Source | None = None
    if reads:
        try:
            trainer = _read_trainer(directory / TRAINER_FILE, state)
            source = _Source(directory, state)
        except (CheckpointError, ModelError, OSError, SafetensorError, KeyError, ValueError) as failure:
            error = str(failure)
    _agree(group, error, f"cannot load the checkpoint {directory}")
    state.load(source.parameter if source else None, source.moment if source else None)
    num_steps, world_size = group.sum([float(trainer.get("num_steps", 0)), float(trainer.get("world_size", 0))])
    state.num_steps = int(num_steps)
    if int(world_size) == group.world_size:
        _scatter_random_states(source.random_states() if source else None, group)
    elif reads:
        logger.warning(
            "the checkpoint is of %d workers, there are %d: random states start anew", world_size, group.world_size
        )


class TorchState:
    """The torch backend's: a `ParallelModel` and its `PolicyOptimizer`."""

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
        with torch.no_grad():
            for name in self._optimizer.names:
                for key, state in self._optimizer.state(name).items():
                    saved = None if moment is None else moment(f"{name}/{key}").view(state.shape)
                    self._model.copy_from_rank_0(state, saved)


class _Source:
    """An opened checkpoint on rank 0: everything is checked to be there before the first tensor is handed out."""

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
            raise CheckpointError(f"it lacks {len(missing)} tensors, the first is {missing[0]}")

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
        logger.warning("the checkpoint has no tokenizer: %s", error)


def _write_trainer(path: Path, state: TrainedState, group: ProcessGroup) -> None:
    content = {
        "format": FORMAT,
        "num_steps": state.num_steps,
        "world_size": group.world_size,
        "parameters": {name: list(shape) for name, shape in state.shapes.items()},
    }
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _read_trainer(path: Path, state: TrainedState) -> dict[str, Any]:
    trainer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if trainer.get("format") != FORMAT:
        raise CheckpointError(f"{path.name} is of format {trainer.get('format')!r}, this version reads format {FORMAT}")
    own = {name: list(shape) for name, shape in state.shapes.items()}
    saved = trainer["parameters"]
    if saved != own:
        name = min(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
        raise CheckpointError(
            f"it is of another model: {name} has the shape {saved.get(name, 'none')} there and {own.get(name, 'none')} "
            "in policy.model_name's"
        )
    return trainer


def _optimizer_files(state: TrainedState, *, keep: bool) -> Iterator[dict[str, torch.Tensor]]:
    """The optimizer's full state, gathered (a collective) and cut into files; empty ones unless `keep`."""
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
    """ "<rank>/<generator>" -> state, of all ranks, on all ranks. A collective."""
    result: dict[str, torch.Tensor] = {}
    for key, own in capture_random_state(group.device).items():
        of_ranks = [own]
        if group.world_size > 1:
            of_ranks = [torch.empty_like(own) for _ in range(group.world_size)]
            dist.all_gather(of_ranks, own)
        result.update({f"{rank}/{key}": state for rank, state in enumerate(of_ranks)})
    return result


def _scatter_random_states(states: dict[str, torch.Tensor] | None, group: ProcessGroup) -> None:
    """Restore each rank's own from rank 0's `states`. A collective."""
    own: dict[str, torch.Tensor] = {}
    for key, like in capture_random_state(group.device).items():
        for rank in range(group.world_size):
            found = None if states is None else states.get(f"{rank}/{key}")
            state = like.clone() if found is None else found
            if group.world_size > 1:
                dist.broadcast(state, src=0)
            if rank == group.rank:
                own[key] = state
    restore_random_state(own, group.device)


def _agree(group: ProcessGroup, error: str | None, what: str) -> None:
    """Raise on every rank when rank 0 met an error. A collective."""
    if not group.sum([float(error is not None)])[0]:
        return
    raise CheckpointError(f"{what}: {error or 'rank 0 met an error, which it reports'}")
