"""Write docs/environment-variables.md from `nemo_rl.settings`. A test fails when the page is not current.

python tools/write_env_table.py
"""

from __future__ import annotations

from pathlib import Path

from nemo_rl import settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "environment-variables.md"

HEAD = """\
# Environment variables

<!-- Written by tools/write_env_table.py from nemo_rl/settings.py: change that file and run the tool. -->

A variable is read when it is needed. An empty one counts as not set; one that cannot be read is an error that names
it. A flag is `1`, `true`, `yes`, `on` or `0`, `false`, `no`, `off`. What a job does is in its configuration; these
variables are about the machine that it runs on.

| variable | default | what it does |
| --- | --- | --- |
"""

TAIL = """
## What workers see of the driver's environment

Variables whose names start with {prefixes}, and {names}.

Nothing else is forwarded; what a worker group is given by `env_vars` wins over the driver's. Values of names that look
secret, such as `HF_TOKEN`, never reach a log, a manifest or an error message.
"""


def page() -> str:
    """The whole page."""
    rows = "".join(f"| `{v.name}` | {_shown(v.default)} | {v.help} |\n" for v in settings.ALL.values())
    prefixes = ", ".join(f"`{prefix}`" for prefix in settings.FORWARDED_PREFIXES)
    names = ", ".join(f"`{name}`" for name in sorted(settings.FORWARDED_NAMES))
    return HEAD + rows + TAIL.format(prefixes=prefixes, names=names)


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
