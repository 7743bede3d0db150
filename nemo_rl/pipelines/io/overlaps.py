"""Rejects pipelines whose inputs, outputs and run directory overlap.

A writer may empty its directory, and a reader reads everything that its directory holds, also in a resumed run. An
overlap could therefore delete the input, or make the output part of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from nemo_rl.errors import PipelineDefinitionError
from nemo_rl.pipelines.io.files import canonical_path, is_below, is_in_process
from nemo_rl.pipelines.stage import AnyStage

_RECORD = "run.json"


def refuse_process_memory(stages: Sequence[AnyStage]) -> None:
    """Raise `PipelineDefinitionError` if a stage reads from or writes to the memory of one process."""
    for stage in stages:
        for url in (*stage.reads_from(), *stage.writes_to()):
            if is_in_process(url):
                raise PipelineDefinitionError(
                    f"stage {stage.name!r}: {url} is in the memory of one process, and stages run in several "
                    "processes. Use a path, or the URL of a store that all processes can reach."
                )


def refuse_overlaps(stages: Sequence[AnyStage], run_dir: str | os.PathLike[str] | None) -> None:
    """Check the paths that stages declare with `reads_from`, `would_read` and `writes_to`.

    Raises:
        PipelineDefinitionError: an input or `run_dir` is in a directory that a stage writes to, an output or a file of
            the run directory would be read as input, or two outputs are the same.
    """
    inputs = [(stage, canonical_path(url)) for stage in stages for url in stage.reads_from()]
    outputs = [(stage, canonical_path(url), url.endswith("/")) for stage in stages for url in stage.writes_to()]
    record = None if run_dir is None else os.path.realpath(run_dir)
    seen: dict[str, str] = {}
    for stage, place, is_directory in outputs:
        what = f"stage {stage.name!r} writes to {place}"
        if place in seen:
            raise PipelineDefinitionError(f"{what}, and so does stage {seen[place]!r}: use different outputs")
        seen[place] = stage.name
        for reader, source in inputs:
            if source == place or (is_directory and is_below(source, place)):
                raise PipelineDefinitionError(f"{what}, where stage {reader.name!r} reads {source}: write elsewhere")
        for reader in () if is_directory else stages:
            if reader.would_read(place):
                raise PipelineDefinitionError(f"{what}, which stage {reader.name!r} would read: write elsewhere")
        if record is not None and (record == place or (is_directory and is_below(record, place))):
            raise PipelineDefinitionError(f"{what}, which contains run_dir={record}: use a run_dir outside it")
    for reader in () if record is None else stages:
        if reader.would_read(os.path.join(str(record), _RECORD)):
            raise PipelineDefinitionError(
                f"stage {reader.name!r} would read the files in run_dir={record}: use another run_dir"
            )
