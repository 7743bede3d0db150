"""What a job would do, without starting anything: `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from nemo_rl import venvs
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.model_files import check_model_name, count_parameters, load_model_config, parameters_in_name
from nemo_rl.jobs.roles import Role, job_roles
from nemo_rl.models.policy.config import EMBEDDED_MODEL, PolicyConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from nemo_rl.algorithms.config import MasterConfig
    from nemo_rl.distributed.config import BundlesConfig

_GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class VenvState:
    """The venv of one or more roles.

    Attributes:
        roles: who runs in it.
        py_executable: as the registry says.
        digest: None for a bare interpreter, such as the driver's.
        num_packages: in a venv of the engine.
        state: what would happen.
    """

    roles: list[str]
    py_executable: str
    digest: str | None
    num_packages: int | None
    state: str


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU (or in one process on CPU), by what they are for; activations are not in it."""

    num_parameters: int
    source: str
    training: int
    generation_weights: int
    kv_cache: int | None

    @property
    def total(self) -> int:
        """Everything that is known."""
        return self.training + self.generation_weights + (self.kv_cache or 0)


@dataclass(frozen=True)
class JobPlan:
    """A whole job."""

    roles: list[Role]
    placements: list[tuple[str, str]]
    venvs: list[VenvState]
    memory: MemoryEstimate | None
    samples_per_step: int


def make_plan(config: MasterConfig) -> JobPlan:
    """Work out what a job would do. Raises what the job would raise for the same wrong input."""
    check_model_name(config.policy)
    roles = job_roles(config)
    return JobPlan(
        roles=roles,
        placements=_placements(config, roles),
        venvs=_venv_states(roles),
        memory=_estimate_memory(config),
        samples_per_step=config.num_samples_per_step,
    )


def print_plan(plan: JobPlan, console: Console) -> None:
    """Show a plan as tables."""
    workers = _table("workers", "role", "workers", "share of its bundle", "worker class")
    for role in plan.roles:
        workers.add_row(role.name, str(role.num_workers), f"{role.share:g}" if role.share else "none", role.fqn)
    pythons = _table("venvs", "roles", "state", "packages", "digest", "py_executable")
    for venv in plan.venvs:
        packages = "" if venv.num_packages is None else str(venv.num_packages)
        pythons.add_row(", ".join(venv.roles), venv.state, packages, (venv.digest or "")[:16], venv.py_executable)
    places = _table("placements", "bundle", "workers")
    for bundle, names in plan.placements:
        places.add_row(bundle, names)
    console.print(
        Group(workers, pythons, places, *_memory_lines(plan), Text(f"{plan.samples_per_step} samples per step"))
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _memory_lines(plan: JobPlan) -> list[Text]:
    memory = plan.memory
    if memory is None:
        return [Text("memory: unknown, the model's config.json is not on this machine and its name states no size")]
    cache = "unknown" if memory.kv_cache is None else f"{memory.kv_cache / _GIB:.2f} GiB"
    training, weights = memory.training / _GIB, memory.generation_weights / _GIB
    return [
        Text(f"memory per worker, without activations: {memory.total / _GIB:.2f} GiB"),
        Text(f"  training {training:.2f} (weights, gradients, AdamW), generation {weights:.2f}, KV cache {cache}"),
        Text(f"  {memory.num_parameters / 1e6:,.1f} M parameters ({memory.source})"),
    ]


def _placements(config: MasterConfig, roles: list[Role]) -> list[tuple[str, str]]:
    cluster = config.cluster
    policy, generation = (role for role in roles if role.share)
    if cluster.generation is None:
        rows = _bundles(cluster, "", [policy, generation])
    else:
        rows = _bundles(cluster, "", [policy]) + _bundles(cluster.generation, "generation ", [generation])
    rows.append(("any node, no bundle", ", ".join(role.name for role in roles if not role.share)))
    return rows


def _bundles(part: BundlesConfig, prefix: str, roles: list[Role]) -> list[tuple[str, str]]:
    kind, per_node = "GPU" if part.use_gpus else "CPU", part.workers_per_node
    rows = []
    for rank in range(part.num_workers):
        names = [f"{role.name}-{rank}" for role in roles if rank < role.num_workers]
        rows.append((f"{prefix}node {rank // per_node}, {kind} {rank % per_node}", ", ".join(names)))
    return rows


def _venv_states(roles: list[Role]) -> list[VenvState]:
    by_python: dict[str, list[str]] = {}
    for role in roles:
        by_python.setdefault(role.py_executable, []).append(role.name)
    states = []
    for py_executable, names in by_python.items():
        plan = venvs.plan(py_executable)
        if plan.is_interpreter:
            states.append(VenvState(names, py_executable, None, None, "used as it is"))
            continue
        sealed = venvs.find_sealed(plan.digest)
        state = "ready" if sealed else "would be built"
        states.append(VenvState(names, py_executable, plan.digest, len(plan.packages), state))
    return states


def _estimate_memory(config: MasterConfig) -> MemoryEstimate | None:
    policy = config.policy
    model, count, source = _model_size(policy)
    if count is None:
        return None
    training = policy.options.training_bytes(policy, count, config.cluster.num_workers)
    generation_bytes = _BYTES[policy.generation.precision or policy.precision]
    samples = config.num_samples_per_step
    workers = policy.generation.num_workers or config.cluster.of_generation.num_workers
    rows = min(policy.generation.max_batch_size, -(-samples // workers))
    cache = (
        None if model is None else _kv_numbers_per_token(model) * generation_bytes * rows * policy.max_sequence_length
    )
    return MemoryEstimate(count, source, training, count * generation_bytes, cache)


def _model_size(policy: PolicyConfig) -> tuple[PretrainedConfig | None, int | None, str]:
    if policy.model_name == EMBEDDED_MODEL:
        from nemo_rl.models.embedded import make_model, make_tokenizer

        embedded = make_model(policy.embedded, make_tokenizer()).config
        return embedded, count_parameters(embedded), "counted"
    try:
        # A plan downloads nothing.
        model = load_model_config(policy.model_name, local_only=True)
    except ConfigError:
        return None, parameters_in_name(policy.model_name), "from its name: config.json is not on this machine"
    return model, count_parameters(model), "counted"


def _kv_numbers_per_token(model: PretrainedConfig) -> int:
    """How many numbers the cache holds for one token of one sequence."""
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return 2 * model.num_hidden_layers * heads * head_dim
