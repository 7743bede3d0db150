"""Builds venvs in a new process and prints the duration as JSON. Used by bench_build.py.

    python venv_caller.py '{"py_executable": "uv run --locked --project P", "names": ["a", "b"]}'

`seconds` is the time from the first call to the last return, without starting Python and importing. Environment
variables set the venv directory and whether bytecode is compiled.
"""

from __future__ import annotations

import json
import sys
import time

from nemo_rl import venvs

if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    started = time.perf_counter()
    ready = [venvs.ensure(request["py_executable"], name) for name in request["names"]]
    seconds = time.perf_counter() - started
    phases = ready[0].manifest.seconds if ready[0].manifest is not None and ready[0].built else {}
    print(json.dumps({"seconds": seconds, "builds": sum(venv.built for venv in ready), "phases": phases}))
