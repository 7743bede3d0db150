"""Computes digests of a run's stages and inputs, which are the same in every process."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from nemo_rl.pipelines.spool import dumps
from nemo_rl.pipelines.stage import AnyStage
from nemo_rl.pipelines.tasks import DocumentBatch, Task
from nemo_rl.venvs.planning.requirements import requirements_of_field

_NOT_CONTENT = ("name", "resources", "batch_size", "num_workers", "max_retries", "runtime_env")
_NOT_INPUT = ("_stage_perf", "_lineage", "_frame", "_table")
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: the class was created by a class statement


def run_fingerprint(name: str, stages: Sequence[AnyStage], fields: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Return a digest of the pipeline's name and stages, which a resumed run must share with the run it resumes.

    The digest covers each stage's name, class, public attributes and `runtime_env`. Attributes count with their values
    if they are plain values, containers or dataclasses; any other object counts with its class only. The contents of
    requirements files and conda files count. `env_vars` do not, because their values may be secrets, and neither do the
    packages of a `py_executable`'s project.

    Args:
        name: name of the pipeline.
        stages: the expanded stages.
        fields: the `runtime_env` of each stage, merged with the pipeline's. None uses the stages' own.
    """
    fields = [stage.runtime_env or {} for stage in stages] if fields is None else fields
    content = [
        [
            stage.name,
            _class_name(stage),
            {key: _plain(value, _class_name) for key, value in vars(stage).items() if _is_content(key)},
            {key: _field_content(key, value) for key, value in stage_fields.items() if key != "env_vars"},
        ]
        for stage, stage_fields in zip(stages, fields, strict=True)
    ]
    return hashlib.sha256(json.dumps([name, content], sort_keys=True).encode()).hexdigest()


def task_digest(task: Task[Any]) -> str:
    """Return a digest of a task's class, id, data and metadata. What stages recorded in the task does not count."""
    fields = {key: value for key, value in vars(task).items() if key not in _NOT_INPUT}
    if isinstance(task, DocumentBatch):
        table = task.to_pyarrow()
        fields |= {"schema": str(table.schema.remove_metadata()), "rows": table.to_pylist()}
    text = json.dumps([_class_name(task), _plain(fields, _describe_object)])
    return hashlib.sha256(text.encode()).hexdigest()


def _is_content(name: str) -> bool:
    return name not in _NOT_CONTENT and not name.startswith("_")


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _field_content(field: str, value: Any) -> Any:
    if field in ("pip", "uv"):
        return requirements_of_field(field, value)
    if field == "conda" and isinstance(value, str | os.PathLike) and Path(value).is_file():
        return Path(value).read_text(encoding="utf-8", errors="replace")
    return _plain(value, _class_name)


def _plain(value: Any, describe_object: Callable[[Any], Any]) -> Any:
    """Convert a value to JSON data that differs for different values. `describe_object` converts any other object."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, describe_object) for item in value]
    if isinstance(value, Mapping):
        pairs = [[_plain(key, describe_object), _plain(item, describe_object)] for key, item in value.items()]
        return {"mapping": sorted(pairs, key=json.dumps)}
    if isinstance(value, AbstractSet):
        return {"set": sorted((_plain(item, describe_object) for item in value), key=json.dumps)}
    if isinstance(value, bytes | bytearray):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"object": [_class_name(value), _plain(fields, describe_object)]}
    return {"object": describe_object(value)}


def _describe_object(value: Any) -> Any:
    """Describe an object by its values or attributes if these define it completely, else by its pickle."""
    kind = type(value)
    if kind.__module__.startswith("pyarrow.") and hasattr(value, "to_pylist"):
        # A pickle also holds padding and the memory around a slice.
        type_text = str(value.schema if hasattr(value, "schema") else value.type)
        return [_class_name(value), type_text, _plain(value.to_pylist(), _describe_object)]
    if _class_name(value) == "pandas.core.frame.DataFrame":  # its pickle depends on which equal strings are one object
        return [_class_name(value), value.dtypes.astype(str).tolist(), _plain(value.to_dict("split"), _describe_object)]
    customizes_pickling = any(getattr(kind, name) is not getattr(object, name) for name in _PICKLING)
    if (
        kind.__flags__ & _HEAP_TYPE
        and not customizes_pickling
        and not issubclass(kind, type)
        and hasattr(value, "__dict__")
    ):
        return [_class_name(value), _plain(vars(value), _describe_object)]
    return hashlib.sha256(dumps(value)).hexdigest()


_PICKLING = ("__reduce_ex__", "__reduce__", "__getstate__")
