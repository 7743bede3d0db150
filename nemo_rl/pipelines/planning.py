"""Checks a pipeline's stages and provides their Pythons, before the first task runs.

The steps run from cheap to expensive: `checked_stages` needs only the stages, `checked_cluster` compares them with the
resources of the nodes, and `planned_stages` builds all venvs in parallel.
"""

from __future__ import annotations

import hashlib
import logging
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from nemo_rl import settings
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.node_venvs import NodeProgressCallback
from nemo_rl.distributed.provisioning.remote_calls import ask_nodes
from nemo_rl.distributed.workers.launch_plan import WorkerPython, activation, prepare_pythons, ray_runtime_env
from nemo_rl.distributed.workers.runtime_env import (
    check_values,
    merged_runtime_env,
    require_programs_on_each_node,
)
from nemo_rl.distributed.workers.runtime_env_fields import (
    checked_runtime_env,
    ray_chooses_python,
)
from nemo_rl.errors import PipelineDefinitionError, ResourceInsufficientError, VenvError
from nemo_rl.pipelines.executors.base import Cluster, PlannedStage, driver_search_path
from nemo_rl.pipelines.runner import StageJob
from nemo_rl.pipelines.stage import (
    ANY_COLUMN,
    AnyStage,
    GatherStage,
    ProcessingStage,
    Resources,
    unsupported_attributes,
)
from nemo_rl.pipelines.tasks import DocumentBatch, Task
from nemo_rl.venvs import VenvPlan, plan, spec_from_runtime_env

logger = logging.getLogger(__name__)

_CHOOSES_VENV = ("pip", "uv", "py_executable")
_GPU_QUERY = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_GPU_QUERY_TIMEOUT_S = 60.0


# --- checks of the stages alone ------------------------------------------------------------------------------------


def checked_stages(
    stages: Sequence[AnyStage], initial_tasks: Sequence[Task[Any]], runtime_env: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Check everything that needs no cluster.

    Returns:
        The `runtime_env` fields of each stage, merged with the pipeline's.

    Raises:
        PipelineDefinitionError: there are no stages, two stages share a name, an attribute is invalid, or no earlier
            stage provides an input of a stage.
        RuntimeEnvError: a field is unknown, malformed, or conflicts with another field.
    """
    if not stages:
        raise PipelineDefinitionError("the pipeline has no stages: add_stage(...)")
    names = [stage.name for stage in stages]
    for stage in stages:
        _check_attributes(stage)
        if names.count(stage.name) > 1:
            raise PipelineDefinitionError(
                f"{names.count(stage.name)} stages are named {stage.name!r}; give them names with "
                "with_(name=...), or a function with processing_stage(name=...)(function)"
            )
    leading = 0
    while leading < len(stages) and stages[leading].runs_in_driver:
        leading += 1
    for stage in stages[leading:]:
        if stage.runs_in_driver:
            raise PipelineDefinitionError(f"stage {stage.name!r} runs in the driver and must come first")
    _check_needs(stages, initial_tasks)
    pipeline_fields = checked_runtime_env(runtime_env, "runtime_env of the pipeline")
    result = []
    for stage in stages:
        where = f"runtime_env of stage {stage.name!r}"
        fields = merged_runtime_env(pipeline_fields, checked_runtime_env(stage.runtime_env, where))
        check_values(fields, where)
        result.append(fields)
    return result


def _check_attributes(stage: AnyStage) -> None:
    if not isinstance(stage.name, str) or not stage.name.strip():
        raise PipelineDefinitionError(
            f"{type(stage).__name__} has the name {stage.name!r}: expected a non-empty string"
        )
    what = f"stage {stage.name!r}"
    if not isinstance(stage.resources, Resources):
        raise PipelineDefinitionError(f"{what}: resources must be Resources(...), not {stage.resources!r}")
    for name, least in (("batch_size", 1), ("num_workers", 1), ("max_retries", 0)):
        value = getattr(stage, name)
        is_valid = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not is_valid and (value is not None or name == "batch_size"):
            raise PipelineDefinitionError(f"{what}: {name} must be an integer of at least {least}, not {value!r}")
    for name, defaults in unsupported_attributes(stage).items():
        if getattr(stage, name) not in defaults:
            kind = "a stage that runs in the driver" if stage.runs_in_driver else "a GatherStage"
            raise PipelineDefinitionError(f"{what}: {name}={getattr(stage, name)!r} is not supported by {kind}")
    base = GatherStage if isinstance(stage, GatherStage) else ProcessingStage
    methods = ("process_all",) if base is GatherStage else ("process", "process_batch")
    if all(getattr(type(stage), method) is getattr(base, method) for method in methods):
        raise PipelineDefinitionError(f"{what} ({type(stage).__name__}) must define {' or '.join(methods)}")


def _check_needs(stages: Sequence[AnyStage], initial_tasks: Sequence[Task[Any]]) -> None:
    attributes = {name for name in dir(initial_tasks[0]) if all(hasattr(task, name) for task in initial_tasks)}
    if all(task.data is None for task in initial_tasks):
        attributes.discard("data")
    tables = [set(task.columns) for task in initial_tasks if isinstance(task, DocumentBatch)]
    columns = set.intersection(*tables) if len(tables) == len(initial_tasks) else set()
    for stage in stages:
        needed_attributes, needed_columns = _declared(stage, "inputs")
        lacking = [f"attribute {name!r}" for name in needed_attributes if name not in attributes]
        if ANY_COLUMN not in columns:
            lacking += [f"column {name!r}" for name in needed_columns if name not in columns]
        if lacking:
            available = ", ".join(sorted(columns)) or "no columns"
            raise PipelineDefinitionError(
                f"stage {stage.name!r} needs the {lacking[0]}, which no earlier stage produces (available: {available})"
            )
        new_attributes, new_columns = _declared(stage, "outputs")
        attributes |= set(new_attributes)
        columns |= set(new_columns)


def _declared(stage: AnyStage, which: str) -> tuple[list[str], list[str]]:
    value = getattr(stage, which)()
    is_pair_of_lists = isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, list) for part in value)
    if not is_pair_of_lists:
        raise PipelineDefinitionError(
            f"stage {stage.name!r}: {which}() must return (list of task attributes, list of columns), not {value!r}"
        )
    return value


# --- resources of the nodes ---------------------------------------------------------------------------------------


def cluster_totals() -> Cluster:
    """Return the CPUs and GPUs of all alive nodes."""
    nodes = alive_nodes()
    return Cluster(*(sum(node.total.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")))


def checked_cluster(stages: Sequence[AnyStage]) -> list[tuple[float, float]]:
    """Return the CPUs and GPUs of one worker of each stage.

    Raises:
        ResourceInsufficientError: no node is large enough for a stage's worker.
    """
    gpu_gb = _gpu_memory_gb() if any(stage.resources.gpu_memory_gb for stage in stages) else None
    nodes = alive_nodes()
    result = []
    for stage in stages:
        wanted = stage.resources
        gpus = wanted.gpus
        if wanted.gpu_memory_gb:
            if gpu_gb is None or wanted.gpu_memory_gb > gpu_gb:
                limit = "the cluster has no GPU" if gpu_gb is None else f"the smallest GPU has {gpu_gb:.0f} GB"
                raise ResourceInsufficientError(
                    f"stage {stage.name!r} asks for {wanted.gpu_memory_gb:g} GB of a GPU's memory; {limit}"
                )
            gpus = round(wanted.gpu_memory_gb / gpu_gb, 4)
        if not any(n.total.get("CPU", 0) >= wanted.cpus and n.total.get("GPU", 0) >= gpus for n in nodes):
            most = {name: max(n.total.get(name, 0) for n in nodes) for name in ("CPU", "GPU")}
            raise ResourceInsufficientError(
                f"stage {stage.name!r} asks for {wanted.cpus:g} CPUs and {gpus:g} GPUs on one node; the largest nodes "
                f"have {most['CPU']:g} CPUs and {most['GPU']:g} GPUs"
            )
        result.append((wanted.cpus, gpus))
    return result


def _gpu_memory_gb() -> float | None:
    """Return the memory of the cluster's smallest GPU, or None without GPUs."""
    with_gpus = [node for node in alive_nodes() if node.total.get("GPU", 0) > 0]
    sizes: list[float] = []
    for node, answer in ask_nodes(_local_gpu_memory_gb, with_gpus, timeout_s=_GPU_QUERY_TIMEOUT_S):
        if isinstance(answer, RayError):
            raise ResourceInsufficientError(f"cannot query the GPUs of node {node.address}: {answer}") from answer
        sizes += answer
    return min(sizes, default=None)


def _local_gpu_memory_gb() -> list[float]:
    output = subprocess.run(_GPU_QUERY, capture_output=True, text=True, check=True).stdout
    return [float(line) * 2**20 / 1e9 for line in output.split("\n") if line.strip()]


# --- Pythons -----------------------------------------------------------------------------------------------------


def planned_stages(
    jobs: Sequence[StageJob],
    fields: Sequence[Mapping[str, Any]],
    resources: Sequence[tuple[float, float]],
    progress: NodeProgressCallback | None = None,
) -> list[PlannedStage]:
    """Build the venvs of all stages on every node in parallel, and return how Ray starts each stage.

    Args:
        jobs: the stages.
        fields: the merged `runtime_env` of each stage.
        resources: CPUs and GPUs of one worker of each stage.
        progress: called with the progress per node and venv.

    Raises:
        VenvError: a stage's venv cannot be planned, for instance because uv finds no compatible versions. The message
            names the stage. No venv has been built.
        NodeVenvError: a venv could not be built on a node.
        ClusterError: a stage asks for conda or podman, and a node lacks it.
    """
    for stage_fields in fields:
        require_programs_on_each_node(stage_fields)
    names = [job.stage.name for job in jobs]
    plans = _plans(dict(zip(names, fields)))
    pythons = prepare_pythons({_venv_name(venv_plan): venv_plan for venv_plan in plans.values()}, progress)
    search_path = driver_search_path()
    result = []
    for job, stage_fields, (cpus, gpus) in zip(jobs, fields, resources):
        name = job.stage.name
        runtime_env: dict[str, Any] = {}
        python_id: str | None = sys.executable
        if not stage_fields:
            env_vars = settings.forwarded()
        elif ray_chooses_python(stage_fields):
            python_id = None
            runtime_env, env_vars = ray_runtime_env(WorkerPython(), stage_fields)
        elif name in plans:
            python = pythons[_venv_name(plans[name])]
            python_id = python.digest
            runtime_env, env_vars = ray_runtime_env(python, stage_fields)
        else:
            driver_python = WorkerPython(python=sys.executable, activation=activation(sys.executable))
            runtime_env, env_vars = ray_runtime_env(driver_python, stage_fields)
        result.append(PlannedStage(job, cpus, gpus, runtime_env, env_vars, search_path, python_id))
    return result


def _plans(fields: Mapping[str, Mapping[str, Any]]) -> dict[str, VenvPlan]:
    """Plan the venv of each stage that asks for one. Equal requests are planned once, different ones in parallel."""
    specs = {
        name: spec_from_runtime_env(stage_fields, stage_fields.get("py_executable") or sys.executable)
        for name, stage_fields in fields.items()
        if any(field in stage_fields for field in _CHOOSES_VENV)
    }
    first_of = {spec: name for name, spec in reversed(specs.items())}

    def planned(name: str) -> VenvPlan:
        try:
            result = plan(specs[name])
            result.check_compatible()
        except VenvError as error:
            error.args = (f"stage {name!r}: {error}", *error.args[1:])
            raise
        return result

    with ThreadPoolExecutor(max_workers=max(1, len(first_of))) as pool:
        by_spec = dict(zip(first_of, pool.map(planned, first_of.values())))
    return {name: by_spec[spec] for name, spec in specs.items()}


def _venv_name(venv_plan: VenvPlan) -> str:
    """Return a venv name that depends only on the request, so stages with equal requests share the venv."""
    requirements = getattr(venv_plan.spec, "requirements", ())
    readable = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", line) for line in requirements if not line.startswith("-"))
    digest = hashlib.sha256(str(venv_plan.spec).encode()).hexdigest()[:8]
    return f"stage-{readable[:60] or Path(getattr(venv_plan.spec, 'project', 'python')).name}-{digest}"
