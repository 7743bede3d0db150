"""The public names: their module paths, the parameters of functions and constructors, and the members of classes.

Users and the worker classes that they bring rely on these. Add a name with a release; never move or rename one.
"""

from __future__ import annotations

import importlib
import inspect

import pytest

# Module path and name -> parameters in the order of the signature, with defaults; None: not a function or class.
SIGNATURES = {
    "nemo_rl.venvs:create_local_venv": "(py_executable, venv_name, force_rebuild=False)",
    "nemo_rl.distributed.node_venvs:create_local_venv_on_each_node": "(py_executable, venv_name)",
    "nemo_rl.distributed.virtual_cluster:init_ray": "(log_dir=None)",
    "nemo_rl.distributed.virtual_cluster:PY_EXECUTABLES": None,
    "nemo_rl.distributed.virtual_cluster:RayVirtualCluster": (
        "(bundle_ct_per_node_list, use_gpus=True, max_colocated_worker_groups=1, num_gpus_per_node=8, name='', "
        "placement_group_strategy='SPREAD', port_range_low=None, port_range_high=None)"
    ),
    "nemo_rl.distributed.ray_actor_environment_registry:ACTOR_ENVIRONMENT_REGISTRY": None,
    "nemo_rl.distributed.ray_actor_environment_registry:get_actor_python_env": "(fqn)",
    "nemo_rl.distributed.ray_actor_environment_registry:register_actor_environment": "(fqn, py_executable)",
    "nemo_rl.distributed.worker_groups:RayWorkerBuilder": (
        "(ray_actor_class_fqn, *args, py_executable=None, runtime_env=None, **kwargs)"
    ),
    "nemo_rl.distributed.worker_groups:RayWorkerGroup": (
        "(cluster, remote_worker_builder, workers_per_node=None, name_prefix='', bundle_indices_list=None, "
        "sharding_annotations=None, env_vars=None, stopped=None)"
    ),
    "nemo_rl.distributed.worker_groups:MultiWorkerFuture": None,
    "nemo_rl.distributed.named_sharding:NamedSharding": "(layout, names)",
    "nemo_rl.distributed.batched_data_dict:BatchedDataDict": None,
    "nemo_rl.distributed.batched_data_dict:SlicedDataDict": None,
    "nemo_rl.environments.interfaces:EnvironmentInterface": None,
    "nemo_rl.environments.interfaces:EnvironmentReturn": None,
    "nemo_rl.environments.math_environment:MathEnvironment": None,
}
MEMBERS = {
    "nemo_rl.distributed.virtual_cluster:PY_EXECUTABLES": "SYSTEM BASE VLLM VLLM_CPU MCORE",
    "nemo_rl.distributed.virtual_cluster:RayVirtualCluster": (
        "get_placement_groups world_size node_count get_available_address_and_port "
        "get_available_addresses_and_ports_batch get_master_address_and_port shutdown"
    ),
    "nemo_rl.distributed.worker_groups:RayWorkerBuilder": "__call__ create_worker_async IsolatedWorkerInitializer",
    "nemo_rl.distributed.worker_groups:RayWorkerGroup": (
        "workers worker_metadata world_size dp_size get_dp_leader_worker_idx master_address master_port "
        "run_single_worker_single_data run_all_workers_single_data run_all_workers_multiple_data "
        "run_all_workers_sharded_data get_all_worker_results shutdown"
    ),
    "nemo_rl.distributed.named_sharding:NamedSharding": (
        "shape names ndim size layout get_ranks get_ranks_by_coord get_worker_coords get_axis_index get_axis_size"
    ),
    "nemo_rl.distributed.batched_data_dict:BatchedDataDict": (
        "from_batches chunk shard_by_batch_size slice get_batch repeat_interleave select_indices reorder_data "
        "truncate_tensors make_microbatch_iterator make_microbatch_iterator_with_dynamic_shapes "
        "make_microbatch_iterator_for_packable_sequences all_gather size to get_dict"
    ),
    "nemo_rl.environments.interfaces:EnvironmentInterface": "step global_post_process_and_metrics shutdown",
}
# Call methods: name -> parameters after self.
GROUP_CALLS = {
    "run_single_worker_single_data": "(method, worker_idx, **)",
    "run_all_workers_single_data": "(method, run_rank_0_only_axes=None, **)",
    "run_all_workers_multiple_data": "(method, run_rank_0_only_axes=None, common_kwargs=None, **)",
    "run_all_workers_sharded_data": (
        "(method, in_sharded_axes=None, replicate_on_axes=None, output_is_replicated=None, "
        "make_dummy_calls_to_free_axes=False, common_kwargs=None, **)"
    ),
    "get_all_worker_results": "(future, return_generators_as_proxies=False)",
    "shutdown": "(cleanup_method=None, timeout=30.0, force=False)",
}
REGISTERED = {
    "nemo_rl.models.generation.vllm.vllm_worker.VllmGenerationWorker": "VLLM",
    "nemo_rl.models.policy.megatron_policy_worker.MegatronPolicyWorker": "MCORE",
    "nemo_rl.environments.math_environment.MathEnvironment": "SYSTEM",
}


def public(path: str) -> object:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def signature_of(value: object, *, skip_self: bool = False, name_of_extra: bool = True) -> str:
    """Parameters and defaults as `(a, b=1, **extra)`, without annotations and markers for keyword-only parameters."""
    parts = []
    for parameter in list(inspect.signature(value).parameters.values())[int(skip_self) :]:  # type: ignore[arg-type]
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        parts.append(stars + (parameter.name if name_of_extra or not stars else "") + default)
    return f"({', '.join(parts)})"


@pytest.mark.parametrize("path", SIGNATURES)
def test_public_name_is_importable(path: str) -> None:
    value, expected = public(path), SIGNATURES[path]
    if expected is not None:
        assert signature_of(value) == expected


@pytest.mark.parametrize("path", MEMBERS)
def test_public_members(path: str) -> None:
    value = public(path)
    source = inspect.getsource(value)  # type: ignore[arg-type]
    missing = [name for name in MEMBERS[path].split() if not hasattr(value, name) and f"self.{name}" not in source]
    assert missing == []


@pytest.mark.parametrize("name", GROUP_CALLS)
def test_calls_of_a_worker_group(name: str) -> None:
    method = getattr(public("nemo_rl.distributed.worker_groups:RayWorkerGroup"), name)
    assert signature_of(method, skip_self=True, name_of_extra=False) == GROUP_CALLS[name]


@pytest.mark.parametrize("fqn", REGISTERED)
def test_registered_worker_classes(fqn: str) -> None:
    registry = public("nemo_rl.distributed.ray_actor_environment_registry:ACTOR_ENVIRONMENT_REGISTRY")
    executables = public("nemo_rl.distributed.virtual_cluster:PY_EXECUTABLES")
    assert registry[fqn] == getattr(executables, REGISTERED[fqn])  # type: ignore[index]
