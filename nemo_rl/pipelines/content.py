"""What a run's result depends on, as text that is the same in every process: of its stages and of its inputs."""

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
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that a class statement made


def fingerprint(name: str, stages: Sequence[AnyStage], fields: Sequence[Mapping[str, Any]] | None = None) -> str:
    """What decides a run's result, as far as it can be seen.

    Of each stage its name, class, public attributes (plain values, containers and dataclasses of them; of any other
    object its class only), and what its `runtime_env` asks for but variables, whose values may be secrets. Lines of
    requirements files count, and what a conda file holds; packages of a `py_executable`'s project do not.

    Args:
        fields: each stage's `runtime_env` with the pipeline's below it; None: the stages' own.
    """
    fields = [stage.runtime_env or {} for stage in stages] if fields is None else fields
    content = [
        [
            stage.name,
            _class_name(stage),
            {key: _plain(value, _class_name) for key, value in vars(stage).items() if _is_content(key)},
            {key: _asked_for(key, value) for key, value in own.items() if key != "env_vars"},
        ]
        for stage, own in zip(stages, fields, strict=True)
    ]
    return hashlib.sha256(json.dumps([name, content], sort_keys=True).encode()).hexdigest()


def identity(task: Task[Any]) -> str:
    """A digest of a task's class, id, data and metadata, whatever the data is. What stages noted in it is left out."""
    fields = {key: value for key, value in vars(task).items() if key not in _NOT_INPUT}
    if isinstance(task, DocumentBatch):
        table = task.to_pyarrow()
        fields |= {"schema": str(table.schema.remove_metadata()), "rows": table.to_pylist()}
    text = json.dumps([_class_name(task), _plain(fields, _of_object)])
    return hashlib.sha256(text.encode()).hexdigest()


def _is_content(name: str) -> bool:
    return name not in _NOT_CONTENT and not name.startswith("_")


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _asked_for(field: str, value: Any) -> Any:
    if field in ("pip", "uv"):
        return requirements_of_field(field, value)
    if field == "conda" and isinstance(value, str | os.PathLike) and Path(value).is_file():
        return Path(value).read_text(encoding="utf-8", errors="replace")
    return _plain(value, _class_name)


def _plain(value: Any, of_object: Callable[[Any], Any]) -> Any:
    """The value as JSON can hold it, with what tells it from others; `of_object` does so for all other objects."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, of_object) for item in value]
    if isinstance(value, Mapping):
        pairs = [[_plain(key, of_object), _plain(item, of_object)] for key, item in value.items()]
        return {"mapping": sorted(pairs, key=json.dumps)}
    if isinstance(value, AbstractSet):
        return {"set": sorted((_plain(item, of_object) for item in value), key=json.dumps)}
    if isinstance(value, bytes | bytearray):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"object": [_class_name(value), _plain(fields, of_object)]}
    return {"object": of_object(value)}


def _of_object(value: Any) -> Any:
    """An object by its values or attributes where these are all there is to it, else by its pickle."""
    kind = type(value)
    if kind.__module__.startswith("pyarrow.") and hasattr(value, "to_pylist"):
        # A pickle also holds what lies beside the values: padding, and the memory around a slice.
        described = str(value.schema if hasattr(value, "schema") else value.type)
        return [_class_name(value), described, _plain(value.to_pylist(), _of_object)]
    if _class_name(value) == "pandas.core.frame.DataFrame":  # in a pickle, equal strings may be one object or several
        return [_class_name(value), value.dtypes.astype(str).tolist(), _plain(value.to_dict("split"), _of_object)]
    has_own_pickle = any(getattr(kind, name) is not getattr(object, name) for name in _PICKLING)
    if kind.__flags__ & _HEAP_TYPE and not has_own_pickle and not issubclass(kind, type) and hasattr(value, "__dict__"):
        return [_class_name(value), _plain(vars(value), _of_object)]
    return hashlib.sha256(dumps(value)).hexdigest()


_PICKLING = ("__reduce_ex__", "__reduce__", "__getstate__")
