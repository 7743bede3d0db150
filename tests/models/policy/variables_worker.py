"""A worker that reports the environment variables that its process had when this module was imported."""

from __future__ import annotations

import os
from typing import Any

AT_IMPORT = dict(os.environ)


class VariablesWorker:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def attestation(self) -> dict[str, Any]:
        return {"variables": AT_IMPORT}

    def shutdown(self) -> None: ...
