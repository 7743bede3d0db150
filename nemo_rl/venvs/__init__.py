"""Python environments for workers: identified by content, built once, sealed, shared.

`create_local_venv` and `ensure` make a venv ready; `plan` says what it will hold without building it. This package
imports neither ray nor torch. See docs/venvs.md.
"""

from nemo_rl.venvs.ensure import SealedVenv, create_local_venv, current_venv_digest, ensure, find_sealed
from nemo_rl.venvs.interpreter import DriverVersions
from nemo_rl.venvs.maintenance import Finding, PruneReport, VenvInfo, list_venvs, prune, verify
from nemo_rl.venvs.planning.plan import Package, VenvPlan
from nemo_rl.venvs.planning.resolve import check_extras, plan
from nemo_rl.venvs.planning.spec import InterpreterSpec, Spec, VenvSpec, parse_py_executable, spec_from_runtime_env
from nemo_rl.venvs.progress import PHASES, Progress, ProgressCallback
from nemo_rl.venvs.storage.layout import UNSET_IN_VENV, Store, activation_env
from nemo_rl.venvs.storage.locks import Lease, hold_lease
from nemo_rl.venvs.storage.manifest import Manifest

__all__ = [
    "PHASES",
    "UNSET_IN_VENV",
    "DriverVersions",
    "Finding",
    "InterpreterSpec",
    "Lease",
    "Manifest",
    "Package",
    "Progress",
    "ProgressCallback",
    "PruneReport",
    "SealedVenv",
    "Spec",
    "Store",
    "VenvInfo",
    "VenvPlan",
    "VenvSpec",
    "activation_env",
    "check_extras",
    "create_local_venv",
    "current_venv_digest",
    "ensure",
    "find_sealed",
    "hold_lease",
    "list_venvs",
    "parse_py_executable",
    "plan",
    "prune",
    "spec_from_runtime_env",
    "verify",
]
