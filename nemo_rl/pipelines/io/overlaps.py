"""Whether a pipeline can use the places that it reads, writes and keeps its record in, and none is in another's way.

A writer may empty its directory, and a reader takes what its directory holds at that time, also when a run goes on: an
overlap would delete the input, or make the output a part of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from nemo_rl.errors import PipelineDefinitionError
from nemo_rl.pipelines.io.files import is_below, is_in_process, place_of
from nemo_rl.pipelines.stage import AnyStage

_RECORD = "run.json"


def refuse_process_memory(stages: Sequence[AnyStage]) -> None:
    """Raise `PipelineDefinitionError` for a place that only the process sees which uses it."""
    for stage in stages:
        for url in (*stage.reads_from(), *stage.writes_to()):
            if is_in_process(url):
                raise PipelineDefinitionError(
                    f"stage {stage.name!r}: {url} is in the memory of one process, and stages run in several: what one "
                    "writes there, nobody else finds. Give a path, or the URL of a store that all of them reach."
                )


def refuse_overlaps(stages: Sequence[AnyStage], run_dir: str | os.PathLike[str] | None) -> None:
    """Check what stages say with `reads_from`, `would_read` and `writes_to`.

    Raises:
        PipelineDefinitionError: a place that is read, or `run_dir`, is in a directory that a stage writes; a file that
            is written, or that a run keeps, would be read as input; or two outputs are the same.
    """
    inputs = [(stage, place_of(url)) for stage in stages for url in stage.reads_from()]
    outputs = [(stage, place_of(url), url.endswith("/")) for stage in stages for url in stage.writes_to()]
    record = None if run_dir is None else os.path.realpath(run_dir)
    seen: dict[str, str] = {}
    for stage, place, is_directory in outputs:
        what = f"stage {stage.name!r} writes to {place}"
        if place in seen:
            raise PipelineDefinitionError(f"{what}, and so does stage {seen[place]!r}: give each its own place")
        seen[place] = stage.name
        for reader, source in inputs:
            if source == place or (is_directory and is_below(source, place)):
                raise PipelineDefinitionError(f"{what}, where stage {reader.name!r} reads {source}: write elsewhere")
        for reader in () if is_directory else stages:
            if reader.would_read(place):
                raise PipelineDefinitionError(f"{what}, which stage {reader.name!r} would read: write elsewhere")
        if record is not None and (record == place or (is_directory and is_below(record, place))):
            raise PipelineDefinitionError(f"{what}, which holds run_dir={record}: give one that is not in it")
    for reader in () if record is None else stages:
        if reader.would_read(os.path.join(str(record), _RECORD)):
            raise PipelineDefinitionError(f"stage {reader.name!r} would read what is in run_dir={record}: give another")
