"""When the code has moved on from a venv: what differs, and what to do about it.

A venv drifts when what it was built for (its name, or its very spec) now resolves to another digest. A change of code
without a change of packages is no drift: the digest is the same. `NEMO_RL_VENV_DRIFT` decides: `rebuild` builds what is
asked for, `refuse` raises `VenvDriftError`, `ignore` goes on with what is there.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable

from nemo_rl import settings
from nemo_rl.errors import VenvDriftError
from nemo_rl.venvs.masking import mask_secrets
from nemo_rl.venvs.planning.plan import VenvPlan
from nemo_rl.venvs.planning.requirements import normalized_name
from nemo_rl.venvs.storage.layout import DIGEST_PREFIX
from nemo_rl.venvs.storage.manifest import Manifest

_MAX_LISTED = 40


def differences(held: Iterable[str], asked: Iterable[str]) -> list[str]:
    """`name old -> new` for every package that differs; a side lists `name==version` or `name @ location`."""
    old, new = _by_name(held), _by_name(asked)
    return [
        f"{name} {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def refusal(venv_plan: VenvPlan, venv_name: str, held: Manifest, held_packages: Iterable[str]) -> VenvDriftError:
    """The error of the policy `refuse`: every package that differs, and the two commands that resolve it."""
    changed = differences(held_packages, map(mask_secrets, venv_plan.requirements))
    python = (held.python, held.implementation, held.platform)
    asked = (venv_plan.python.version, venv_plan.python.implementation, venv_plan.python.platform)
    if python != asked:
        changed.insert(0, f"Python {' '.join(python)} -> {' '.join(asked)}")
    if not changed:
        changed = ["the same versions, from other files (hashes differ)"]
    shown = changed[:_MAX_LISTED]
    if len(changed) > len(shown):
        shown.append(f"and {len(changed) - len(shown)} more")
    listing = "\n  ".join(shown)
    return VenvDriftError(
        f"The venv {venv_name!r} on {socket.gethostname()} is not what the code asks for (digest "
        f"{held.digest[:DIGEST_PREFIX]} -> {venv_plan.digest[:DIGEST_PREFIX]}):\n  {listing}\n"
        f"Either build it here, and then run the same command: `export {settings.VENV_DRIFT.name}=rebuild`; or make an "
        "image of this code: `docker buildx build --target release -f docker/Dockerfile --tag nemo-rl:latest .` "
        f"({settings.VENV_DRIFT.name}=ignore goes on with the packages that are there.)"
    )


def _by_name(lines: Iterable[str]) -> dict[str, str]:
    found = {}
    for line in lines:
        name, version = line, "(any version)"
        for separator in ("==", " @ "):
            if separator in line:
                name, _, version = line.partition(separator)
                break
        found[normalized_name(name)] = version
    return found
