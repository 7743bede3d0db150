"""Requirements and markers, parsed by `packaging`, which reads their strings with `ast.literal_eval`."""

from __future__ import annotations

import functools

from packaging.markers import Marker
from packaging.requirements import Requirement

from nemo_rl.parsing import PARSER_LOCK


@functools.lru_cache(maxsize=4096)
def parse_marker(text: str) -> Marker:
    """Parse an environment marker, such as `sys_platform == 'linux'`. Raises `InvalidMarker`."""
    with PARSER_LOCK:
        return Marker(text)


def parse_requirement(text: str) -> Requirement:
    """Parse a requirement, such as `torch>=2.4; sys_platform == 'linux'`. Raises `InvalidRequirement`."""
    with PARSER_LOCK:
        return Requirement(text)
