"""Plans a job without starting it: `--dry-run` for this machine, `nemo-rl plan` also for a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from nemo_rl import settings
from nemo_rl.algorithms.config import OnPolicyJobConfig
from nemo_rl.algorithms.distillation_config import DistillationJobConfig
from nemo_rl.distributed.cluster import placement
from nemo_rl.distributed.cluster.placement import NodeResources
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.job_config import JobConfig, evaluation_of
from nemo_rl.jobs.model_files import (
    check_model_fits,
    check_model_name,
    count_parameters,
    load_architecture,
    parameters_in_name,
)
from nemo_rl.jobs.model_sources import find_model
from nemo_rl.jobs.roles import EVALUATION_PREFIX, Role, job_roles, role_plans
from nemo_rl.jobs.venv_forecast import BUILT, READY, RECEIVED, VenvForecast, forecast_venvs, wheel_sizes_of
from nemo_rl.jobs.weight_route import check_weight_route
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.venvs import VenvPlan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from nemo_rl.distributed.config import BundlesConfig

_GIB = 2**30
_NODE_TIMEOUT_S = 120.0
THIS_MACHINE = "this machine"

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class VenvState:
    """Describes the venv of one or more roles.

    Attributes:
        roles: names of the roles that run in the venv.
        py_executable: the Python of these roles.
        digest: digest of the venv; None for an interpreter such as the driver's, or a Python that Ray creates.
        num_packages: number of packages; None without a digest.
        state: state of the venv, with the number of nodes per state if they differ.
    """

    roles: list[str]
    py_executable: str
    digest: str | None
    num_packages: int | None
    state: str


@dataclass(frozen=True)
class NodeForecast:
    """Forecasts the venv builds of one node.

    Attributes:
        address: address of the node.
        venvs: one forecast per venv.
        problem: why there is no forecast; empty if there is one.
    """

    address: str
    venvs: list[VenvForecast] = field(default_factory=list)
    problem: str = ""


@dataclass(frozen=True)
class Placement:
    """Describes one bundle: its GPU or CPU, its workers, and the address of its node if known."""

    bundle: str
    workers: str
    address: str = ""


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimates the memory of one GPU (on CPU: of one process) in bytes, without activations."""

    num_parameters: int
    source: str
    training: int
    generation_weights: int
    kv_cache: int | None
    teacher_weights: int = 0

    @property
    def total(self) -> int:
        """Sum of the known parts."""
        return self.training + self.generation_weights + (self.kv_cache or 0) + self.teacher_weights


@dataclass(frozen=True)
class NodeAssignment:
    """Assigns the nodes of a job to nodes of the running cluster.

    Attributes:
        addresses: address of each node of each separate cluster (see `clusters_of`), as far as they were assigned.
        obstacle: why a node could not be assigned; empty if all are.
    """

    addresses: Mapping[str, Sequence[str]] = field(default_factory=dict)
    obstacle: str = ""


@dataclass(frozen=True)
class JobPlan:
    """Describes what a job would do.

    Attributes:
        obstacle: why the running cluster cannot start the job now; empty if it can or no cluster was asked.
    """

    roles: list[Role]
    placements: list[Placement]
    venvs: list[VenvState]
    nodes: list[NodeForecast]
    memory: MemoryEstimate | None
    samples_per_step: int
    obstacle: str = ""


def make_plan(config: JobConfig, on_cluster: bool = False) -> JobPlan:
    """Plan a job. Raises the errors that the job would raise for invalid input.

    Args:
        config: configuration of the job.
        on_cluster: ask every node of the Ray cluster that this process is connected to, instead of this machine.
    """
    check_model_name(config.policy)
    roles = job_roles(config)
    if isinstance(config, OnPolicyJobConfig):
        check_weight_route(config)
    if isinstance(config, DistillationJobConfig):
        find_model(config.teacher.model_name, key="teacher.model_name")
    ray_nodes = None
    if on_cluster:
        from nemo_rl.distributed.cluster.nodes import worker_nodes  # imports ray, which other plans do not need

        ray_nodes = worker_nodes()
    plans = role_plans(roles)
    nodes = _forecasts(plans, ray_nodes)
    assignment = NodeAssignment() if ray_nodes is None else assign_nodes(ray_nodes, clusters_of(config))
    return JobPlan(
        roles=roles,
        placements=_placements(config, roles, assignment),
        venvs=_venv_states(roles, plans, nodes),
        nodes=nodes,
        memory=_estimate_memory(config),
        samples_per_step=config.num_samples_per_step,
        obstacle=assignment.obstacle,
    )


def _placements(config: JobConfig, roles: list[Role], assignment: NodeAssignment) -> list[Placement]:
    clusters = clusters_of(config)
    rows = []
    for name, part in clusters.items():
        hosted = [role for role in roles if role.share and (role.name if role.name in clusters else "policy") == name]
        rows += _bundles(part, "" if name == "policy" else f"{name} ", hosted, assignment.addresses.get(name, ()))
    if outside := [role.name for role in roles if not role.share]:
        rows.append(Placement("any node, no bundle", ", ".join(outside)))
    return rows


def _bundles(part: BundlesConfig, prefix: str, roles: list[Role], addresses: Sequence[str]) -> list[Placement]:
    kind, per_node = "GPU" if part.use_gpus else "CPU", part.workers_per_node
    rows = []
    for rank in range(part.num_workers):
        names = [f"{role.name}-{rank}" for role in roles if rank < role.num_workers]
        node = rank // per_node
        address = addresses[node] if addresses else ""
        rows.append(Placement(f"{prefix}node {node}, {kind} {rank % per_node}", ", ".join(names), address))
    return rows


def clusters_of(config: JobConfig) -> dict[str, BundlesConfig]:
    """Return the bundles of the policy, and of each role that has bundles of its own, by the name of the role."""
    clusters: dict[str, BundlesConfig] = {"policy": config.cluster}
    if config.cluster.generation is not None:
        clusters["generation"] = config.cluster.generation
    if isinstance(config, DistillationJobConfig) and config.teacher.cluster is not None:
        clusters["teacher"] = config.teacher.cluster
    if (evaluation := evaluation_of(config)) is not None:
        clusters[f"{EVALUATION_PREFIX}generation"] = evaluation.cluster
    return clusters


def assign_nodes(nodes: Sequence[NodeResources], clusters: Mapping[str, BundlesConfig]) -> NodeAssignment:
    """Assign the nodes of a job to nodes of a cluster, from their free resources."""
    addresses: dict[str, Sequence[str]] = {}
    free = [dict(node.free) for node in nodes]
    for name, part in clusters.items():
        bundle = {"GPU": 1.0, "CPU": 1.0} if part.use_gpus else {"CPU": 1.0}
        capacities = [placement.capacity(resources, bundle) for resources in free]
        assigned = placement.plan(capacities, [part.workers_per_node] * part.num_nodes, "SPREAD")
        if assigned is None:
            kind = "GPUs" if part.use_gpus else "CPUs"
            available = ", ".join(f"{node.address} {count}" for node, count in zip(nodes, capacities, strict=True))
            request = f"the job needs {part.num_nodes} nodes with {part.workers_per_node} {kind} each"
            return NodeAssignment(addresses, f"{request}; free: {available or 'no node'}.")
        for node in assigned:
            for resource, amount in bundle.items():
                free[node][resource] -= amount * part.workers_per_node
        addresses[name] = [nodes[node].address for node in assigned]
    return NodeAssignment(addresses)


def _forecasts(plans: dict[str, VenvPlan], nodes: list[NodeResources] | None) -> list[NodeForecast]:
    sizes = wheel_sizes_of(plans.values())
    if nodes is None:
        return [NodeForecast(THIS_MACHINE, forecast_venvs(plans, sizes, {}))]
    from ray.exceptions import RayError

    from nemo_rl.distributed.provisioning.node_task import driver_variables
    from nemo_rl.distributed.provisioning.remote_calls import ask_nodes

    answers = ask_nodes(forecast_venvs, nodes, plans, sizes, driver_variables(), timeout_s=_NODE_TIMEOUT_S)
    forecasts = [
        NodeForecast(node.address, problem=f"no answer: {str(answer).strip().rpartition(chr(10))[2]}")
        if isinstance(answer, RayError)
        else NodeForecast(node.address, answer)
        for node, answer in answers
    ]
    return forecasts if settings.VENV_SPREAD.get() == "off" else assign_sources(forecasts)


def assign_sources(nodes: Sequence[NodeForecast]) -> list[NodeForecast]:
    """Adapt forecasts to the broadcast of venvs between nodes.

    Nodes without a venv receive it from the first node that has it, else from the first node, which builds it. The
    duration of the transfer is not estimated.
    """
    return [replace(node, venvs=[_from_source(venv, node, nodes) for venv in node.venvs]) for node in nodes]


def _from_source(venv: VenvForecast, node: NodeForecast, nodes: Sequence[NodeForecast]) -> VenvForecast:
    if venv.state != BUILT:
        return venv
    same = [(other, candidate) for other in nodes for candidate in other.venvs if candidate.digest == venv.digest]
    ready = [pair for pair in same if pair[1].state == READY]
    source, forecast = (ready or [pair for pair in same if pair[1].state == BUILT])[0]
    if source is node:
        return venv
    how = "which has it" if ready else f"which builds it in {forecast.seconds:g} s"
    basis = f"from {source.address}, {how}"
    return replace(venv, state=RECEIVED, num_cached=0, num_unknown=0, download_bytes=0, seconds=0.0, basis=basis)


def _venv_states(roles: list[Role], plans: dict[str, VenvPlan], nodes: list[NodeForecast]) -> list[VenvState]:
    groups: dict[tuple[str, str | None], list[Role]] = {}
    for role in roles:
        plan = plans.get(role.venv)
        groups.setdefault((role.py_executable, None if plan is None else plan.digest), []).append(role)
    states = []
    for (py_executable, digest), group in groups.items():
        names = [f"{role.name} (child process)" if role.own_process else role.name for role in group]
        plan = plans.get(group[0].venv)
        if plan is None or plan.is_interpreter:
            state = "when its workers start" if plan is None else "interpreter"
            states.append(VenvState(names, py_executable, None, None, state))
            continue
        counts = Counter(venv.state for node in nodes for venv in node.venvs if venv.digest == digest)
        counts.update("unknown" for node in nodes if node.problem)
        state = next(iter(counts)) if len(counts) == 1 else ", ".join(f"{s} on {n} nodes" for s, n in counts.items())
        states.append(VenvState(names, py_executable, digest, len(plan.packages), state))
    return states


def _estimate_memory(config: JobConfig) -> MemoryEstimate | None:
    policy = config.policy if isinstance(config, OnPolicyJobConfig) else config.trained_policy
    model, count, source = _model_size(policy, use_gpus=config.cluster.for_generation.use_gpus)
    if count is None:
        return None
    training = policy.options.training_bytes(policy, count, config.cluster.num_workers)
    if not isinstance(config, OnPolicyJobConfig):
        return MemoryEstimate(count, source, training, generation_weights=0, kv_cache=0)
    generation_bytes = _BYTES[policy.generation.precision or policy.precision]
    samples = config.num_samples_per_step
    workers = policy.generation.num_workers or config.cluster.for_generation.num_workers
    rows = min(policy.generation.max_batch_size, -(-samples // workers))
    cache = (
        None if model is None else _kv_numbers_per_token(model) * generation_bytes * rows * policy.max_sequence_length
    )
    teacher = _teacher_weights(config) if isinstance(config, DistillationJobConfig) else 0
    return MemoryEstimate(count, source, training, count * generation_bytes, cache, teacher)


def _teacher_weights(config: DistillationJobConfig) -> int:
    """Estimate the bytes of the teacher's weights in one of its workers; 0 if its size is unknown."""
    policy = config.teacher.as_policy(config.policy)
    policy = policy.model_copy(update={"model_name": find_model(policy.model_name).name})
    part = config.teacher.cluster or config.cluster
    _, count, _ = _model_size(policy, use_gpus=part.use_gpus)
    return 4 * (count or 0) // (part.num_workers if policy.sharding == "fsdp" else 1)


def _model_size(policy: PolicyConfig, *, use_gpus: bool) -> tuple[PretrainedConfig | None, int | None, str]:
    try:
        model = load_architecture(policy, local_only=True)  # a plan downloads nothing
    except ConfigError:
        return None, parameters_in_name(policy.model_name), "from its name, because config.json is not on this machine"
    check_model_fits(policy, model, use_gpus=use_gpus)
    return model, count_parameters(model), "counted"


def _kv_numbers_per_token(model: PretrainedConfig) -> int:
    """Return the number of KV cache elements per token of a sequence."""
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return 2 * model.num_hidden_layers * heads * head_dim
