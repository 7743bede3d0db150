"""The policy worker that trains with megatron-core: one rank's pipeline stage, and its share of every matrix.

megatron-core's pipeline schedule runs the micro-batches. Losses and metrics exist on the last stage, which shares them
with the others. Ranks that differ in any coordinate but the data-parallel one must get the same shard.
"""

from __future__ import annotations

from nemo_rl.models.policy.megatron import expected_warnings  # noqa: F401 - megatron-core warns while it is imported

# isort: split
from typing import Any

import megatron.core
import torch
from transformers import PreTrainedModel

from nemo_rl import settings
from nemo_rl.errors import ConfigError
from nemo_rl.models.backends import policy_backend
from nemo_rl.models.policy.hf_loading import empty_model, load_config, load_model
from nemo_rl.models.policy.megatron.config import MegatronOptions
from nemo_rl.models.policy.megatron.cpu import adapt_to_cpu
from nemo_rl.models.policy.megatron.families import find_family
from nemo_rl.models.policy.megatron.forward import PipelineForward
from nemo_rl.models.policy.megatron.model import PolicyModel, build_model, wrap_for_training
from nemo_rl.models.policy.megatron.optimizer import MegatronOptimizer
from nemo_rl.models.policy.megatron.parallel import leave_grid, make_grid
from nemo_rl.models.policy.megatron.state import MegatronState
from nemo_rl.models.policy.megatron.weights import WeightExchange
from nemo_rl.models.policy.offload import Scratch
from nemo_rl.models.policy.parallel_model import TensorReader
from nemo_rl.models.policy.process_group import ProcessGroup
from nemo_rl.models.policy.worker_base import PolicyWorker


class MegatronPolicyWorker(PolicyWorker):
    """Trains a Hugging Face causal language model of a supported family with megatron-core.

    See `PolicyWorker` for arguments and errors. `config.options` is a `MegatronOptions`.
    """

    _needs_collectives = True

    def _check_config(self) -> None:
        config, options = self._config, self._config.options
        if not isinstance(options, MegatronOptions):
            raise ConfigError(f"policy.options is a {type(options).__name__}: set policy.backend=megatron")
        options.layout(settings.WORLD_SIZE.get())  # raises if the number of workers does not divide
        self._options = options
        self._hf = load_config(config.model_name, config.attn_implementation)
        options.check_model(self._hf, config)
        self._family = find_family(self._hf.model_type)
        # For processes without Ray; Ray starts its workers with these variables.
        settings.export(policy_backend(config.backend).gpu_env_vars)

    @property
    def _data_ranks(self) -> ProcessGroup:
        return self._grid.data

    def _build(self, total_steps: int) -> None:
        if self._group.device.type == "cpu":
            adapt_to_cpu()
        self._grid = make_grid(self._group, self._options)
        self._skeleton = empty_model(self._hf)
        config, options = self._config, self._options
        model = build_model(self._hf, self._family, config, options, self._grid, trained=True)
        exchange = self._exchange(model)
        wrapped = wrap_for_training(model, options)
        optimizer = MegatronOptimizer(wrapped, config, options, total_steps=total_steps)
        self._state = MegatronState(
            self._skeleton,
            exchange,
            optimizer,
            dtype=model.config.params_dtype,
            distributed_optimizer=options.distributed_optimizer,
        )
        loaded = self._load_on_rank_0()
        self._state.load_weights(None if loaded is None else _reader(loaded))
        if loaded is not None:
            self._skeleton.generation_config = loaded.generation_config
        self._optimizer = optimizer
        self._forward = self._pipeline(wrapped)
        self._memory = self._track_memory(
            model, model.parameters, Scratch(optimizer.release_gradients, optimizer.allocate_gradients)
        )

    def _load_reference(self) -> PipelineForward:
        model = build_model(self._hf, self._family, self._config, self._options, self._grid, trained=False)
        loaded = self._load_on_rank_0()
        with torch.no_grad():
            self._exchange(model).scatter(
                None if loaded is None else _reader(loaded), lambda parameter, value: parameter.copy_(value)
            )
        self._track_reference(model, model.parameters)
        return self._pipeline(model)

    def _exchange(self, model: PolicyModel) -> WeightExchange:
        shapes = {name: parameter.shape for name, parameter in self._skeleton.named_parameters()}
        return WeightExchange(model, self._hf, self._family, shapes, self._grid)

    def _pipeline(self, model: Any) -> PipelineForward:
        return PipelineForward(
            model,
            self._grid,
            self._options,
            self._hf.vocab_size,
            packed=self._config.batching.mode == "packed",
            temperature=self._config.generation.temperature,
        )

    def _load_on_rank_0(self) -> PreTrainedModel | None:
        """Load the model into rank 0's main memory; other ranks read no weights."""
        return load_model(self._config.model_name, self._hf) if self._group.rank == 0 else None

    def _on_all_ranks(self, result: Any) -> Any:
        return self._grid.from_last_stage(result)

    def attestation(self) -> dict[str, Any]:
        """Describe this worker; see `PolicyWorker.attestation`. Adds its megatron-core and its place in the grid."""
        grid = self._grid
        return {
            **super().attestation(),
            "megatron_core": megatron.core.__version__,
            "tensor_rank": grid.tensor.rank(),
            "context_rank": grid.context.rank(),
            "data_rank": grid.data.rank,
            "pipeline_stage": grid.stage,
        }

    def shutdown(self) -> None:
        """Leave megatron-core's groups and the process group. Idempotent."""
        leave_grid()
        super().shutdown()


def _reader(model: PreTrainedModel) -> TensorReader:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return parameters.__getitem__
