"""The teacher on the driver. This module imports no worker: `models.backends` names the worker class."""

from __future__ import annotations

import torch

from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
from nemo_rl.distributed.worker_groups import RayWorkerBuilder
from nemo_rl.models.backends import teacher_backend
from nemo_rl.models.cpu_threads import cpu_env_vars
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.model_group import ModelGroup, join_rows
from nemo_rl.models.teacher.config import TeacherConfig
from nemo_rl.models.teacher.interfaces import TeacherInterface


class Teacher(ModelGroup, TeacherInterface):
    """Runs a teacher with one worker on each bundle of a cluster. It starts in the background; see `ModelGroup`.

    Args:
        cluster: the cluster that the workers run on.
        config: the section `teacher`.
        student: the section `policy`, whose sequence length and temperature the teacher takes.
        model_name: directory or hub name of the model, which is not an embedded one.
        num_tokens: tokens that the student knows: the size of its vocabulary, or of the teacher's if that is smaller.
    """

    def __init__(
        self,
        cluster: RayVirtualCluster,
        config: TeacherConfig,
        student: PolicyConfig,
        model_name: str,
        *,
        num_tokens: int,
    ) -> None:
        self._num_tokens = num_tokens
        policy = config.as_policy(student).model_copy(update={"model_name": model_name})
        backend = teacher_backend(config.backend)
        builder = RayWorkerBuilder(
            backend.fqn,
            policy,
            num_local_workers=max(cluster.bundle_counts),
            device_type="cuda" if cluster.use_gpus else "cpu",
            py_executable=backend.py_executable_override(config.py_executable, use_gpus=cluster.use_gpus),
        )
        super().__init__(
            cluster,
            builder,
            policy.options.layout(cluster.world_size()),
            config.batching,
            name="teacher",
            env_vars=backend.gpu_env_vars if cluster.use_gpus else cpu_env_vars(),
        )

    def get_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        shards, order = self._shard(self._padded(batch), batch_size=None)
        return join_rows(self._on_shards("get_logprobs", shards), order)[: batch.size]

    def get_top_logprobs(self, batch: BatchedDataDict, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        shards, order = self._shard(self._padded(batch), batch_size=None)
        results = self._on_shards("get_top_logprobs", shards, k=k, num_tokens=self._num_tokens)
        ids, logprobs = (join_rows(list(parts), order)[: batch.size] for parts in zip(*results, strict=True))
        return ids, logprobs

    def _padded(self, batch: BatchedDataDict) -> BatchedDataDict:
        """Return what the workers need, with rows repeated until the number of workers divides their number."""
        inputs = batch.select_keys("input_ids", "input_lengths", "token_mask")
        missing = -batch.size % self.data_parallel_size
        if not missing:
            return inputs
        return inputs.select_indices([row % batch.size for row in range(batch.size + missing)])

    def offload(self) -> None:
        """Keep the weights in the hosts' memory between calls, because others use the same GPUs."""
        self._on_all("offload")
