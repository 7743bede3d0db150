"""What a job would do, without starting anything: `--dry-run` on this machine, `nemo-rl plan` also on a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from nemo_rl import settings, venvs
from nemo_rl.distributed.cluster import placement
from nemo_rl.distributed.cluster.placement import NodeResources
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.model_files import (
    check_model_fits,
    check_model_name,
    count_parameters,
    load_architecture,
    parameters_in_name,
)
from nemo_rl.jobs.roles import Role, check_weight_route, job_roles
from nemo_rl.jobs.venv_forecast import BUILT, READY, RECEIVED, VenvForecast, forecast_venvs, wheel_sizes_of
from nemo_rl.models.policy.config import PolicyConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from nemo_rl.algorithms.config import MasterConfig
    from nemo_rl.distributed.config import BundlesConfig, ClusterConfig

_GIB = 2**30
_NODE_TIMEOUT_S = 120.0
THIS_MACHINE = "this machine"

# Of the policy's part of the cluster and of generation's: the address of each of the job's nodes, or nothing.
Addresses = tuple[Sequence[str], Sequence[str]]
NOWHERE: Addresses = ((), ())
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class VenvState:
    """The venv of one or more roles.

    Attributes:
        roles: who runs in it.
        py_executable: as the registry says.
        digest: None for a bare interpreter, such as the driver's.
        num_packages: in a venv of the engine.
        state: what would happen; of several nodes, on how many.
    """

    roles: list[str]
    py_executable: str
    digest: str | None
    num_packages: int | None
    state: str


@dataclass(frozen=True)
class NodeForecast:
    """One node: what making its venvs ready would take, or why it is not known."""

    address: str
    venvs: list[VenvForecast] = field(default_factory=list)
    problem: str = ""


@dataclass(frozen=True)
class Placement:
    """One bundle: which GPU or CPU of which node of the job, who works there, and the Ray node where it is known."""

    bundle: str
    workers: str
    address: str = ""


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
    """A whole job.

    Attributes:
        obstacle: why the running cluster could not serve it now; empty when it could, or was not asked.
    """

    roles: list[Role]
    placements: list[Placement]
    venvs: list[VenvState]
    nodes: list[NodeForecast]
    memory: MemoryEstimate | None
    samples_per_step: int
    obstacle: str = ""


def make_plan(config: MasterConfig, on_cluster: bool = False) -> JobPlan:
    """Work out what a job would do. Raises what the job would raise for the same wrong input.

    Args:
        on_cluster: ask every node of the Ray cluster that this process is connected to. Else only this machine.
    """
    check_model_name(config.policy)
    roles = job_roles(config)
    check_weight_route(config)
    ray_nodes = _alive_nodes() if on_cluster else None
    plans = {role.fqn: venvs.plan(role.py_executable) for role in roles}
    nodes = _forecasts(plans, ray_nodes)
    addresses, obstacle = (NOWHERE, "") if ray_nodes is None else addresses_on(ray_nodes, config.cluster)
    return JobPlan(
        roles=roles,
        placements=_placements(config, roles, addresses),
        venvs=_venv_states(roles, plans, nodes),
        nodes=nodes,
        memory=_estimate_memory(config),
        samples_per_step=config.num_samples_per_step,
        obstacle=obstacle,
    )


def _placements(config: MasterConfig, roles: list[Role], addresses: Addresses) -> list[Placement]:
    cluster = config.cluster
    policy, generation = (role for role in roles if role.share)
    if cluster.generation is None:
        rows = _bundles(cluster, "", [policy, generation], addresses[0])
    else:
        rows = _bundles(cluster, "", [policy], addresses[0])
        rows += _bundles(cluster.generation, "generation ", [generation], addresses[1])
    rows.append(Placement("any node, no bundle", ", ".join(role.name for role in roles if not role.share)))
    return rows


def _bundles(part: BundlesConfig, prefix: str, roles: list[Role], addresses: Sequence[str]) -> list[Placement]:
    kind, per_node = "GPU" if part.use_gpus else "CPU", part.workers_per_node
    rows = []
    for rank in range(part.num_workers):
        names = [f"{role.name}-{rank}" for role in roles if rank < role.num_workers]
        node = rank // per_node
        where = addresses[node] if addresses else ""
        rows.append(Placement(f"{prefix}node {node}, {kind} {rank % per_node}", ", ".join(names), where))
    return rows


def addresses_on(nodes: Sequence[NodeResources], cluster: ClusterConfig) -> tuple[Addresses, str]:
    """Where the job's nodes would be on what is free now, and what stands in the way (empty: nothing)."""
    found: list[Sequence[str]] = [(), ()]
    free = [dict(node.free) for node in nodes]
    for index, part in enumerate([cluster] if cluster.generation is None else [cluster, cluster.generation]):
        bundle = {"GPU": 1.0, "CPU": 1.0} if part.use_gpus else {"CPU": 1.0}
        capacities = [placement.capacity(resources, bundle) for resources in free]
        chosen = placement.plan(capacities, [part.workers_per_node] * part.num_nodes, "SPREAD")
        if chosen is None:
            kind = "GPUs" if part.use_gpus else "CPUs"
            there = ", ".join(f"{node.address} {room}" for node, room in zip(nodes, capacities, strict=True))
            asked = f"{part.num_nodes} nodes with {part.workers_per_node} {kind} each are asked for"
            return (found[0], found[1]), f"{asked}; free: {there or 'no node'}."
        for node in chosen:
            for name, amount in bundle.items():
                free[node][name] -= amount * part.workers_per_node
        found[index] = [nodes[node].address for node in chosen]
    return (found[0], found[1]), ""


def _alive_nodes() -> list[NodeResources]:
    from nemo_rl.distributed.cluster.nodes import alive_nodes  # imports ray, which a plan for this machine need not

    return [node for node in alive_nodes() if node.total.get("CPU", 0) > 0 or node.total.get("GPU", 0) > 0]


def _forecasts(plans: dict[str, venvs.VenvPlan], nodes: list[NodeResources] | None) -> list[NodeForecast]:
    sizes = wheel_sizes_of(plans.values())
    if nodes is None:
        return [NodeForecast(THIS_MACHINE, forecast_venvs(plans, sizes, {}))]
    from ray.exceptions import RayError

    from nemo_rl.distributed.provisioning.node_task import driver_variables
    from nemo_rl.distributed.provisioning.remote_calls import ask_nodes

    answers = ask_nodes(forecast_venvs, nodes, plans, sizes, driver_variables(), timeout_s=_NODE_TIMEOUT_S)
    found = [
        NodeForecast(node.address, problem=f"no answer: {str(answer).strip().rpartition(chr(10))[2]}")
        if isinstance(answer, RayError)
        else NodeForecast(node.address, answer)
        for node, answer in answers
    ]
    return found if settings.VENV_SPREAD.get() == "off" else with_sources(found)


def with_sources(nodes: Sequence[NodeForecast]) -> list[NodeForecast]:
    """Forecasts of nodes that give venvs to one another: the first that has a venv, else the first that lacks it, is
    where the others get it from; for how long that takes there is no measure."""
    return [replace(node, venvs=[_from_source(venv, node, nodes) for venv in node.venvs]) for node in nodes]


def _from_source(venv: VenvForecast, node: NodeForecast, nodes: Sequence[NodeForecast]) -> VenvForecast:
    if venv.state != BUILT:
        return venv
    same = [(other, theirs) for other in nodes for theirs in other.venvs if theirs.digest == venv.digest]
    having = [pair for pair in same if pair[1].state == READY]
    source, there = (having or [pair for pair in same if pair[1].state == BUILT])[0]
    if source is node:
        return venv
    how = "which has it" if having else f"which builds it in {there.seconds:g} s"
    basis = f"from {source.address}, {how}"
    return replace(venv, state=RECEIVED, num_cached=0, num_unknown=0, download_bytes=0, seconds=0.0, basis=basis)


def _venv_states(roles: list[Role], plans: dict[str, venvs.VenvPlan], nodes: list[NodeForecast]) -> list[VenvState]:
    by_python: dict[str, list[Role]] = {}
    for role in roles:
        by_python.setdefault(role.py_executable, []).append(role)
    states = []
    for py_executable, group in by_python.items():
        plan, names = plans[group[0].fqn], [role.name for role in group]
        if plan.is_interpreter:
            states.append(VenvState(names, py_executable, None, None, "used as it is"))
            continue
        found = Counter(venv.state for node in nodes for venv in node.venvs if venv.digest == plan.digest)
        found.update("unknown" for node in nodes if node.problem)
        state = next(iter(found)) if len(found) == 1 else ", ".join(f"{s} on {n} nodes" for s, n in found.items())
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
    workers = policy.generation.num_workers or config.cluster.for_generation.num_workers
    rows = min(policy.generation.max_batch_size, -(-samples // workers))
    cache = (
        None if model is None else _kv_numbers_per_token(model) * generation_bytes * rows * policy.max_sequence_length
    )
    return MemoryEstimate(count, source, training, count * generation_bytes, cache)


def _model_size(policy: PolicyConfig) -> tuple[PretrainedConfig | None, int | None, str]:
    try:
        # A plan downloads nothing.
        model = load_architecture(policy, local_only=True)
    except ConfigError:
        return None, parameters_in_name(policy.model_name), "from its name: config.json is not on this machine"
    check_model_fits(policy, model)
    return model, count_parameters(model), "counted"


def _kv_numbers_per_token(model: PretrainedConfig) -> int:
    """How many numbers the cache holds for one token of one sequence."""
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return 2 * model.num_hidden_layers * heads * head_dim
