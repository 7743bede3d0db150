"""Who trains and who generates: a backend's name in the configuration -> its worker class and its own options.

A backend is one worker class, one section of options (if it has any) and one line in a registry
(`models.policy.registry`, `models.generation.registry`). The driver reads everything else that it must know from here,
so no other file names a backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nemo_rl.distributed.ray_actor_environment_registry import get_actor_python_env
from nemo_rl.errors import ConfigError
from nemo_rl.utils.config import ConfigModel, OpenSection, validate
from nemo_rl.utils.names import did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from nemo_rl.distributed.named_sharding import NamedSharding
    from nemo_rl.models.policy.config import PolicyConfig

DATA_PARALLEL = "data_parallel"


class PolicyOptions(OpenSection):
    """What only one policy backend knows; a subclass adds keys. Without any, every worker holds the whole model."""

    def layout(self, num_workers: int) -> NamedSharding:
        """Which rank has which place. One axis must be `DATA_PARALLEL`; batches are replicated along all others.

        Raises:
            ConfigError: `num_workers` cannot be laid out so.
        """
        from nemo_rl.distributed.named_sharding import NamedSharding

        return NamedSharding(list(range(num_workers)), [DATA_PARALLEL])

    def check(self, policy: PolicyConfig) -> None:
        """Refuse settings of the rest of the section that this backend cannot honour, as `ConfigError`."""

    def check_model(self, model: PretrainedConfig, policy: PolicyConfig) -> None:
        """Refuse a model that this backend cannot compute or divide as configured, as `ModelError`.

        The driver asks as soon as it has read the model's configuration, before workers are started.
        """

    def training_bytes(self, policy: PolicyConfig, num_parameters: int, num_workers: int) -> int:
        """Estimate of what weights, gradients and AdamW take in one worker, without activations."""
        # AdamW keeps two float32 moments besides the float32 master weight and its gradient.
        return num_parameters * 16 // (num_workers if policy.sharding == "fsdp" else 1)

    @classmethod
    def variants(cls) -> Iterable[tuple[str, type[ConfigModel]]]:
        from nemo_rl.models.policy.registry import BACKENDS  # which imports this module

        return [(f"policy.backend={name}", backend.options) for name, backend in BACKENDS.items()]


class GenerationOptions(OpenSection):
    """What only one generation backend knows; a subclass adds keys."""

    @property
    def workers_per_replica(self) -> int:
        """Workers (bundles) that hold one copy of the model together."""
        return 1

    @property
    def sleeps(self) -> bool:
        """Whether `sleep` gives the memory of GPUs back."""
        return False

    def check_model(self, model: PretrainedConfig, policy: PolicyConfig) -> None:
        """As `PolicyOptions.check_model`, for what generates."""

    @classmethod
    def variants(cls) -> Iterable[tuple[str, type[ConfigModel]]]:
        from nemo_rl.models.generation.registry import BACKENDS  # which imports this module

        return [(f"policy.generation.backend={name}", backend.options) for name, backend in BACKENDS.items()]


OptionsT = TypeVar("OptionsT", bound=OpenSection)


@dataclass(frozen=True)
class Backend(Generic[OptionsT]):
    """One kind of workers.

    Attributes:
        fqn: fully qualified name of the worker class. Which Python it runs in is said in
            `nemo_rl.distributed.ray_actor_environment_registry`.
        options: the section that its options are checked against.
        cpu_py_executable: a Python for nodes without GPUs, instead of the registered one, which it `replaces`.
        replaces: what must be registered for it; a user who registered another Python gets that one everywhere.
        streams_weights: its workers can send a stream of weights (`send_weights`, `weight_endpoint`), or of generation
            workers: their `update_weights` takes a `WeightStream` too, as `receive` does.
        offloads: of policy workers: they have `offload`, after which every call brings back what it needs.
        gpu_env_vars: of policy workers on GPUs: variables that CUDA reads before a worker could set them.
    """

    fqn: str
    options: type[OptionsT]
    cpu_py_executable: str | None = None
    replaces: str | None = None
    streams_weights: bool = False
    offloads: bool = False
    gpu_env_vars: Mapping[str, str] = field(default_factory=dict)

    def py_executable_override(self, chosen: str | None, *, use_gpus: bool) -> str | None:
        """What to give `RayWorkerBuilder`: the configuration's choice, that for nodes without GPUs, or None."""
        if chosen is not None or use_gpus or self.cpu_py_executable is None:
            return chosen
        return self.cpu_py_executable if get_actor_python_env(self.fqn) == self.replaces else None

    def py_executable(self, chosen: str | None, *, use_gpus: bool) -> str:
        """The Python that its workers run in."""
        return self.py_executable_override(chosen, use_gpus=use_gpus) or get_actor_python_env(self.fqn)


def find_backend(backends: Mapping[str, Backend[OptionsT]], name: str, *, key: str, registry: str) -> Backend[OptionsT]:
    """A backend by name. Raises `ConfigError` that names the nearest known one; `key` is the configuration's."""
    try:
        return backends[name]
    except KeyError:
        hint = did_you_mean(name, backends)
        raise ConfigError(
            f"{key}={name!r} is unknown.{hint} Known: {', '.join(sorted(backends))}. Add yours to {registry}."
        ) from None


def check_options(backend: Backend[OptionsT], options: Any, *, key: str) -> OptionsT:
    """Options as given in a configuration (a mapping, or the section itself) as the backend's own section."""
    if isinstance(options, OpenSection):
        options = options.model_dump()
    return validate(backend.options, options, where=key)
