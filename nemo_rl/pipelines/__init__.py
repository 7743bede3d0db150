"""Runs data pipelines whose stages may need different versions of the same library. See docs/pipelines.md.

The names below are imported on first use, because a stage's worker needs only a few of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rl.pipelines.executors.actor_pool import RayActorPoolExecutor
    from nemo_rl.pipelines.executors.base import Executor
    from nemo_rl.pipelines.executors.ray_data import RayDataExecutor
    from nemo_rl.pipelines.executors.xenna import XennaExecutor
    from nemo_rl.pipelines.failures import FailedTask, failed_tasks
    from nemo_rl.pipelines.pipeline import Pipeline
    from nemo_rl.pipelines.progress import StageProgress
    from nemo_rl.pipelines.stage import (
        ANY_COLUMN,
        CompositeStage,
        FunctionStage,
        GatherStage,
        ProcessingStage,
        Resources,
        processing_stage,
    )
    from nemo_rl.pipelines.tasks import DocumentBatch, EmptyTask, FileGroupTask, StagePerf, Task

_NAMES_OF_MODULE = {
    "nemo_rl.pipelines.executors.actor_pool": ("RayActorPoolExecutor",),
    "nemo_rl.pipelines.executors.base": ("Executor",),
    "nemo_rl.pipelines.executors.ray_data": ("RayDataExecutor",),
    "nemo_rl.pipelines.executors.xenna": ("XennaExecutor",),
    "nemo_rl.pipelines.failures": ("FailedTask", "failed_tasks"),
    "nemo_rl.pipelines.pipeline": ("Pipeline",),
    "nemo_rl.pipelines.progress": ("StageProgress",),
    "nemo_rl.pipelines.stage": (
        "ANY_COLUMN",
        "CompositeStage",
        "FunctionStage",
        "GatherStage",
        "ProcessingStage",
        "Resources",
        "processing_stage",
    ),
    "nemo_rl.pipelines.tasks": ("DocumentBatch", "EmptyTask", "FileGroupTask", "StagePerf", "Task"),
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}

__all__ = [
    "ANY_COLUMN",
    "CompositeStage",
    "DocumentBatch",
    "EmptyTask",
    "Executor",
    "FailedTask",
    "FileGroupTask",
    "FunctionStage",
    "GatherStage",
    "Pipeline",
    "ProcessingStage",
    "RayActorPoolExecutor",
    "RayDataExecutor",
    "Resources",
    "StagePerf",
    "StageProgress",
    "Task",
    "XennaExecutor",
    "failed_tasks",
    "processing_stage",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
