"""The house rules of docs/architecture.md, checked on the sources and in fresh processes."""

from __future__ import annotations

import ast
import builtins
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "nemo_rl"
EVERYBODY = {"errors", "settings", "secrets"}
# They serve every package above `venvs`.
SERVANTS = {"utils", "observability"}
# Room -> the rooms that it may import. A room may always import itself.
MAY_IMPORT = {
    "errors": set(),
    "settings": {"errors"},
    "secrets": set(),
    "venvs": set(),
    "utils": set(),
    "observability": {"utils"},
    "distributed": {"venvs", *SERVANTS},
    "data": {"distributed", *SERVANTS},
    "environments": {"data", "distributed", *SERVANTS},
    "models": {"data", "distributed", *SERVANTS},
    "algorithms": {"models", "environments", "data", "distributed", *SERVANTS},
    "pipelines": {"environments", "data", "distributed", "venvs", *SERVANTS},
    "jobs": {"pipelines", "algorithms", "models", "environments", "data", "distributed", "venvs", *SERVANTS},
    "cli": {"jobs", "pipelines", "algorithms", "models", "environments", "data", "distributed", "venvs", *SERVANTS},
}
# Of some rooms others see only the modules with these names.
FACES = {
    ("algorithms", "models"): {"interfaces", "config"},
    ("algorithms", "environments"): {"interfaces", "config"},
}
# Run in a worker's process before this package can be imported there, so they set (never read) variables themselves.
SET_ENVIRONMENT = {"distributed/workers/host.py", "distributed/cluster/setup_worker.py"}
# Entry points that talk to a person.
MAY_PRINT = ("cli/", "jobs/command_line.py")
# What a driver imports: everything but `models`, of which it gets what these rooms import.
DRIVER_ROOMS = tuple(MAY_IMPORT.keys() - {"models", "errors", "settings", "secrets"})


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Modules of this package that a source names, wherever in the file (also for type checking only), and the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == "nemo_rl")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            if node.module and node.module.split(".")[0] == "nemo_rl":
                for alias in node.names:
                    below = f"{node.module}.{alias.name}"
                    yield (below if is_module(below) else node.module), node.lineno


def is_module(name: str) -> bool:
    path = PACKAGE.parent / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_is_in_the_table() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} <= set(MAY_IMPORT)


def test_nobody_imports_from_a_room_above() -> None:
    broken = []
    for file, tree in sources():
        room = Path(file).parts[0].removesuffix(".py")
        for module, line in imported_modules(tree):
            target = room_of(module)
            if target in (room, "") or target in EVERYBODY or room == "__init__":
                continue
            face = FACES.get((room, target))
            if target not in MAY_IMPORT[room] or (face is not None and module.rpartition(".")[2] not in face):
                broken.append(f"{file}:{line} imports {module}")
    assert broken == []


def test_nobody_imports_a_worker_module() -> None:
    """They are named by string in the registry, and imported only inside their own venvs."""
    broken = [
        f"{file}:{line} imports {module}"
        for file, tree in sources()
        for module, line in imported_modules(tree)
        if module.endswith("_worker")
    ]
    assert broken == []


def test_only_settings_reads_the_environment() -> None:
    broken = []
    for file, tree in sources():
        if file == "settings.py":
            continue
        written = {id(value) for value in _written(tree)} if file in SET_ENVIRONMENT else set()
        for node in ast.walk(tree):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) and node.module == "os" else []
            )
            touched = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv")
            if touched and id(node) not in written:
                broken.append(f"{file}:{node.lineno}")
            if {"environ", "environb", "getenv"} & set(names):
                broken.append(f"{file}:{node.lineno}")
    assert broken == []


def _written(tree: ast.Module) -> Iterator[ast.expr]:
    """Mappings that are only written to: `x` in `x.update(...)` and in `x[name] = value`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update":
            yield node.func.value
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            yield node.value


def test_nobody_prints() -> None:
    broken = [
        f"{file}:{node.lineno}"
        for file, tree in sources()
        if not file.startswith(MAY_PRINT)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert broken == []


def test_errors_that_leave_a_room_are_in_the_tree_of_errors() -> None:
    """Another exception may only be a signal inside its room."""
    signals = {
        node.name: Path(file).parts[0]
        for file, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and file != "errors.py" and _is_plain_exception(node)
    }
    broken = [
        f"{file}:{node.lineno} imports {alias.name}"
        for file, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemo_rl.")
        for alias in node.names
        if alias.name in signals and Path(file).parts[0] != signals[alias.name]
    ]
    assert broken == []


def _is_plain_exception(node: ast.ClassDef) -> bool:
    bases = [getattr(builtins, base.id, object) for base in node.bases if isinstance(base, ast.Name)]
    return bool(bases) and all(isinstance(base, type) and issubclass(base, BaseException) for base in bases)


# Imports modules, then reports what was loaded or tried. Tried counts: a `try: import vllm` is an import too.
_PROBE = """
import importlib, json, sys
class Tried:
    names = set()
    def find_spec(self, name, path=None, target=None):
        self.names.add(name.partition(".")[0])
        return None
sys.meta_path.insert(0, Tried())
for module in sys.argv[1:]:
    importlib.import_module(module)
sys.stdout.write(json.dumps(sorted(Tried.names)))
"""


def imports_of(*modules: str) -> set[str]:
    """Top-level packages that importing `modules` imports, or tries to, in a fresh process."""
    command = [sys.executable, "-c", _PROBE, *modules]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def modules_of(*rooms: str) -> list[str]:
    files = [file for file, _ in sources() if Path(file).parts[0] in rooms]
    names = ["nemo_rl." + file.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for file in files]
    return [name for name in names if not name.endswith(("_worker", "__main__"))]


def test_venvs_need_neither_ray_nor_torch() -> None:
    assert not {"ray", "torch"} & imports_of(*modules_of("venvs"))


@pytest.mark.parametrize("module", ["nemo_rl.cli", "nemo_rl.distributed.ray_actor_environment_registry"])
def test_the_command_line_and_the_registry_load_fast(module: str) -> None:
    assert not {"ray", "torch", "transformers", "pydantic"} & imports_of(module)


def test_a_driver_imports_no_workers_stack() -> None:
    """Also not where it is installed: the driver's venv may hold vLLM, but the driver must not need it."""
    loaded = imports_of(
        *modules_of(*DRIVER_ROOMS), "nemo_rl.models.policy.interfaces", "nemo_rl.models.generation.interfaces"
    )
    assert "ray" in loaded  # the probe works
    assert not {"vllm", "megatron"} & loaded


def test_importing_the_package_has_no_side_effect() -> None:
    program = (
        "import json, logging, os, sys, threading\n"
        "before = dict(os.environ), sorted(os.listdir()), len(logging.root.handlers), set(sys.modules)\n"
        "import nemo_rl\n"
        "after = dict(os.environ), sorted(os.listdir()), len(logging.root.handlers), set(sys.modules)\n"
        "new = sorted(after[3] - before[3])\n"
        "sys.stdout.write(json.dumps([before[:3] == after[:3], threading.active_count(), new]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [True, 1, ["nemo_rl"]]
