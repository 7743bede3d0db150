"""A worker that says which variables its process had before its own first line."""

from __future__ import annotations

import os
from typing import Any

AT_IMPORT = dict(os.environ)


class VariablesWorker:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def attestation(self) -> dict[str, Any]:
        return {"variables": AT_IMPORT}

    def shutdown(self) -> None: ...
