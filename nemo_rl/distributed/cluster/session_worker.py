"""Runs a Ray worker of a warm session: reports what it imports, and then runs Ray's script in the same process.

The raylet runs this file by path in the worker's Python, which may lack `nemo_rl`: SCRIPT [ARGUMENT ...].
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time

_FIRST_REPORT_S = 2.0
_LAST_REPORT_S = 600.0


def main() -> None:
    import template_client  # next to this script

    template = os.environ[template_client.TEMPLATE_VARIABLE]
    threading.Thread(target=_report, args=(template_client.report_imports, template), daemon=True).start()
    sys.argv[:] = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")


def _report(report_imports, template: str) -> None:  # type: ignore[no-untyped-def]
    """Report the imports at growing intervals: a worker is usually killed, and imports most in its first seconds."""
    wait_s, reported = _FIRST_REPORT_S, 0
    while wait_s < _LAST_REPORT_S:
        time.sleep(wait_s)
        wait_s *= 2
        if len(sys.modules) != reported:
            reported = len(sys.modules)
            report_imports(template)


if __name__ == "__main__":
    main()
