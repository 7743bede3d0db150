"""A process that has just started makes venvs ready, and prints how long that took, as JSON. Used by bench_build.py.

    python venv_caller.py '{"py_executable": "uv run --locked --project P", "names": ["a", "b"]}'

`seconds` runs from the first call to the last return; starting Python and importing are not in it. Where the venvs go
and whether bytecode is compiled is decided by the environment, as always.
"""

from __future__ import annotations

import json
import sys
import time

from nemo_rl import venvs

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    started = time.perf_counter()
    made = [venvs.ensure(asked["py_executable"], name) for name in asked["names"]]
    seconds = time.perf_counter() - started
    phases = made[0].manifest.seconds if made[0].manifest is not None and made[0].built else {}
    print(json.dumps({"seconds": seconds, "builds": sum(venv.built for venv in made), "phases": phases}))
