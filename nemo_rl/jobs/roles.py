"""Derives the worker groups of a job from its configuration: class, Python and number of workers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from packaging.version import Version

from nemo_rl.algorithms.config import OnPolicyJobConfig
from nemo_rl.algorithms.distillation_config import DistillationJobConfig
from nemo_rl.algorithms.eval_config import EvalConfig
from nemo_rl.algorithms.record_config import RecordJobConfig
from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES
from nemo_rl.distributed.workers.runtime_env_fields import named_spec, ray_chooses_python
from nemo_rl.environments.class_lookup import check_class
from nemo_rl.environments.registry import (
    EPISODE_ENVIRONMENTS,
    WORKER_FQN,
    declared_config,
    entry_fqn,
    environment_fqn,
    python_fields,
)
from nemo_rl.errors import ConfigError, IncompatibleVenvError, VenvError
from nemo_rl.jobs.job_config import JobConfig, evaluation_of
from nemo_rl.models.backends import Backend, generation_backend, policy_backend, teacher_backend
from nemo_rl.models.generation.replica_layout import replica_bundles
from nemo_rl.venvs import DriverVersions, InterpreterSpec, Spec, VenvPlan, VenvSpec, check_extras, plan

if TYPE_CHECKING:
    from nemo_rl.distributed.config import BundlesConfig
    from nemo_rl.environments.config import EnvironmentConfig, EnvironmentEntry
    from nemo_rl.models.generation.config import GenerationConfig

# Begins the names of roles that evaluate in the background of a training job.
EVALUATION_PREFIX = "evaluation "

_OLDEST_PYTHON = Version("3.10")  # of `environments.episode_child`


@dataclass(frozen=True)
class Role:
    """Describes one worker group of a job.

    Attributes:
        name: "policy", "generation", "teacher", or "environment" (with turns: "environment <name>"). Those of an
            evaluation in the background begin with `EVALUATION_PREFIX`.
        key: its section in the configuration, such as "env.<name>", for messages.
        fqn: fully qualified name of the worker class; with turns, of the environment.
        num_workers: number of workers on all nodes.
        share: fraction of a bundle (a GPU or a CPU) per worker; 0 for workers outside the bundles.
        venv: name of its venv in the venv directory; empty if Ray creates its Python (conda, containers).
        spec: what the venv contains; None if Ray creates its Python.
        own_process: whether a child process of each worker runs in that Python; None if the role cannot have one.
    """

    name: str
    key: str
    fqn: str
    num_workers: int
    share: float
    venv: str = ""
    spec: Spec | None = None
    own_process: bool | None = None

    @property
    def py_executable(self) -> str:
        """The Python of its workers."""
        return "created by Ray" if self.spec is None else str(self.spec)


def num_colocated_groups(config: OnPolicyJobConfig) -> int:
    """Return the number of worker groups that share the policy's bundles."""
    has_teacher = isinstance(config, DistillationJobConfig) and config.teacher.cluster is None
    return 1 + (config.cluster.generation is None) + has_teacher


def job_roles(config: JobConfig | EvalConfig) -> list[Role]:
    """Return the roles of a training job or of an evaluation.

    Raises:
        ConfigError: an unknown back end or environment, or its class does not exist or does not accept its arguments.
        UnregisteredActorError: the class of an environment is not registered.
        InvalidPyExecutableError, RuntimeEnvError: the Python of a role is not accepted.
        UnknownExtraError: the project lacks the extra of a role.
    """
    if isinstance(config, EvalConfig):
        roles = _eval_roles(config)
    else:
        roles = _record_roles(config) if isinstance(config, RecordJobConfig) else _on_policy_roles(config)
        if (evaluation := evaluation_of(config)) is not None:
            roles += [replace(role, name=f"{EVALUATION_PREFIX}{role.name}") for role in _eval_roles(evaluation)]
    for role in roles:
        if role.spec is not None:
            with _naming(role.key):
                check_extras(role.spec)
    return roles


def _on_policy_roles(config: OnPolicyJobConfig) -> list[Role]:
    policy, cluster = config.policy, config.cluster
    trainer = policy_backend(policy.backend)
    share = 1 / num_colocated_groups(config)
    with _naming("policy"):
        policy_venv = _backend_venv(trainer, policy.py_executable, use_gpus=cluster.use_gpus)
    return [
        Role("policy", "policy", trainer.fqn, cluster.num_workers, share, *policy_venv),
        _generation_role(policy.generation, cluster.for_generation, share if cluster.generation is None else 1.0),
        *([_teacher_role(config, share)] if isinstance(config, DistillationJobConfig) else []),
        *environment_roles(config.env),
    ]


def _teacher_role(config: DistillationJobConfig, share: float) -> Role:
    teacher = config.teacher
    part = teacher.cluster or config.cluster
    backend = teacher_backend(teacher.backend)
    with _naming("teacher"):
        venv = _backend_venv(backend, teacher.py_executable, use_gpus=part.use_gpus)
    share = share if teacher.cluster is None else 1.0
    return Role("teacher", "teacher", backend.fqn, part.num_workers, share, *venv)


def _record_roles(config: RecordJobConfig) -> list[Role]:
    policy, cluster = config.policy, config.cluster
    trainer = policy_backend(policy.backend)
    with _naming("policy"):
        venv = _backend_venv(trainer, policy.py_executable, use_gpus=cluster.use_gpus)
    return [Role("policy", "policy", trainer.fqn, cluster.num_workers, 1.0, *venv)]


def _eval_roles(config: EvalConfig) -> list[Role]:
    generation = config.policy.generation
    return [_generation_role(generation, config.cluster, 1.0), *environment_roles(config.env)]


def _generation_role(generation: GenerationConfig, part: BundlesConfig, share: float) -> Role:
    backend = generation_backend(generation.backend)
    replica_bundles(
        [part.workers_per_node] * part.num_nodes, generation.num_workers, generation.options.workers_per_replica
    )  # raises if the numbers do not fit
    with _naming("policy.generation"):
        venv = _backend_venv(backend, generation.py_executable, use_gpus=part.use_gpus)
    num_workers = generation.num_workers or part.num_workers
    return Role("generation", "policy.generation", backend.fqn, num_workers, share, *venv)


def _backend_venv(backend: Backend, chosen: str | None, *, use_gpus: bool) -> tuple[str, Spec]:
    override = backend.py_executable_override(chosen, use_gpus=use_gpus)
    return named_spec(backend.fqn, {} if override is None else {"py_executable": override})


def environment_roles(config: EnvironmentConfig) -> list[Role]:
    """Return the roles of the environments. Raises the errors of `job_roles`."""
    entries = config.entries()
    if not entries:
        fqn = environment_fqn(config.name)
        if config.name in EPISODE_ENVIRONMENTS:
            raise ConfigError(
                f"env.name={config.name}: this environment has a section of its own; write "
                f"env.{config.name}.class={config.name}, with its arguments in env.{config.name}.config"
            )
        return [Role("environment", "env", fqn, 1, 0.0, *named_spec(fqn, {}))]
    return [_environment_role(name, entry) for name, entry in entries.items()]


def _environment_role(name: str, entry: EnvironmentEntry) -> Role:
    role = Role(
        f"environment {name}",
        f"env.{name}",
        entry_fqn(entry),
        entry.num_replicas,
        0.0,
        own_process=entry.own_process,
    )
    fields = python_fields(role.key, role.fqn, entry.py_executable, entry.runtime_env, own_process=entry.own_process)
    if not ray_chooses_python(fields):
        with _naming(role.key):
            # Named after the class that runs in it: the environment in a child process, or the worker.
            venv, spec = named_spec(role.fqn if entry.own_process else WORKER_FQN, fields)
        role = replace(role, venv=venv, spec=spec)
    if not {"working_dir", "py_modules"} & {*fields}:  # they may hold the class
        search_path = fields.get("env_vars", {}).get("PYTHONPATH", "").split(os.pathsep)
        check_class(
            role.key,
            role.fqn,
            entry.config,
            in_driver_python=role.spec == InterpreterSpec(PY_EXECUTABLES.SYSTEM),
            search_path=[directory for directory in search_path if directory],
        )
    declared_config(f"{role.key}.config", role.fqn, entry.config)
    return role


def role_plans(roles: Sequence[Role]) -> dict[str, VenvPlan]:
    """Resolve the venvs of all roles, in parallel, without building anything. Equal venvs are resolved once.

    Returns:
        The plan of each venv, by its name. Roles whose Python Ray creates have none.

    Raises:
        VenvError: see `plan_python`. The message begins with the role's section of the configuration.
    """
    first_of: dict[tuple[Spec, bool], Role] = {}
    for role in roles:
        if role.spec is not None:
            first_of.setdefault((role.spec, bool(role.own_process)), role)

    def planned(role: Role) -> VenvPlan:
        assert role.spec is not None
        with _naming(role.key):
            return plan_python(role.key, role.spec, own_process=role.own_process)

    with ThreadPoolExecutor(max_workers=max(1, len(first_of))) as pool:
        plans = dict(zip(first_of, pool.map(planned, first_of.values())))
    return {role.venv: plans[role.spec, bool(role.own_process)] for role in roles if role.spec is not None}


def plan_python(label: str, spec: Spec, *, own_process: bool | None = None) -> VenvPlan:
    """Resolve the Python of a worker group, and check that its workers can run in it.

    Args:
        label: what messages call the group.
        spec: its Python.
        own_process: see `Role`.

    Raises:
        IncompatibleVenvError: the version of Python or ray is not the driver's; with `own_process`, it is below 3.10.
        VenvError: the venv has no ray, or cannot be resolved (see `nemo_rl.venvs.plan`).
    """
    if own_process:
        venv_plan = plan(spec, expected=DriverVersions.any())
        if Version(venv_plan.python.version) < _OLDEST_PYTHON:
            raise IncompatibleVenvError(
                f"the Python of {label} ({spec}) is {venv_plan.python.version}, and environments need at least "
                f"{_OLDEST_PYTHON}. Choose another one by py_executable."
            )
        return venv_plan
    fix = (
        ""
        if own_process is None
        else f" Or set own_process=true for {label}: then its code runs in a child process of its workers."
    )
    try:
        venv_plan = plan(spec)
        venv_plan.check_compatible()
    except IncompatibleVenvError as error:
        raise IncompatibleVenvError(f"{error}{fix}") from None
    if isinstance(spec, VenvSpec) and venv_plan.ray is None:
        raise VenvError(f"the venv of {label} ({spec}) has no ray, which its workers need. Add ray.{fix}")
    return venv_plan


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    """Begin the message of a `VenvError` in the block with a section of the configuration."""
    try:
        yield
    except VenvError as error:
        error.args = (f"{key}: {error}", *error.args[1:])
        raise
