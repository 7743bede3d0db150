"""The import rules of docs/architecture.md, checked on the sources and in new processes."""

from __future__ import annotations

import ast
import builtins
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Set
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "nemo_rl"
COMMON = {"errors", "settings", "secrets", "parsing"}
# Every package above `venvs` may import them.
SHARED = {"utils", "observability"}
# Package -> the packages that it may import. A package may always import itself and `COMMON`.
MAY_IMPORT = {
    "errors": set(),
    "settings": {"errors"},
    "secrets": {"settings"},
    "parsing": set(),
    "venvs": set(),
    "utils": set(),
    "observability": {"utils"},
    "distributed": {"venvs", *SHARED},
    "data": {"distributed", *SHARED},
    "environments": {"data", "distributed", *SHARED},
    "models": {"data", "distributed", *SHARED},
    "algorithms": {"models", "environments", "data", "distributed", *SHARED},
    "pipelines": {"environments", "data", "distributed", "venvs", *SHARED},
    "jobs": {"pipelines", "algorithms", "models", "environments", "data", "distributed", "venvs", *SHARED},
    "cli": {"jobs", "pipelines", "algorithms", "models", "environments", "data", "distributed", "venvs", *SHARED},
}
# (importing package, imported package) -> names of the only modules that may be imported.
INTERFACES = {
    ("algorithms", "models"): {"interfaces", "config"},
    ("algorithms", "environments"): {"interfaces", "config", "episode_calls"},
}
# They run in a worker's process before this package can be imported there, so they set variables without `settings`.
SET_ENVIRONMENT = {"distributed/workers/host.py"}
# They run by path in a Python that may lack this package, so they use the standard library only, and `os.environ`.
RUN_BY_PATH = {
    f"distributed/cluster/{name}.py"
    for name in ("setup_worker", "session_worker", "template_client", "template_process")
}
# Entry points that write to the terminal.
MAY_PRINT = ("cli/", "jobs/command_line.py")
# The packages that a driver imports. Of `models` it gets what these packages import.
DRIVER_PACKAGES = tuple(MAY_IMPORT.keys() - {"models", "errors", "settings", "secrets"})


@cache
def sources() -> list[tuple[str, ast.Module]]:
    return [
        (path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def imported_modules(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield each module of nemo_rl that a source imports, with the line: at the top, in functions, for types only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == "nemo_rl")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            if node.module and node.module.split(".")[0] == "nemo_rl":
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    yield (submodule if is_module(submodule) else node.module), node.lineno


@cache
def is_module(name: str) -> bool:
    path = PACKAGE.parent / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def module_name(file: str) -> str:
    return "nemo_rl." + file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def test_table_names_every_package() -> None:
    packages = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert packages - {"__init__"} <= set(MAY_IMPORT)


def test_imports_follow_the_table() -> None:
    broken = []
    for file, tree in sources():
        package = Path(file).parts[0].removesuffix(".py")
        for module, line in imported_modules(tree):
            target = package_of(module)
            if target in (package, "") or target in COMMON or package == "__init__":
                continue
            allowed = INTERFACES.get((package, target))
            if target not in MAY_IMPORT[package] or (allowed is not None and module.rpartition(".")[2] not in allowed):
                broken.append(f"{file}:{line} imports {module}")
    assert broken == []


def import_cycles(graph: Mapping[str, Set[str]]) -> list[frozenset[str]]:
    """Return the strongly connected components with more than one module (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    cycles: list[frozenset[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for target in sorted(graph[module]):
            if target not in order:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], order[target])
        if low[module] == order[module]:
            index = stack.index(module)
            component, stack[index:] = frozenset(stack[index:]), []
            if len(component) > 1:
                cycles.append(component)

    for module in sorted(graph):
        if module not in order:
            visit(module)
    return cycles


def test_import_cycles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert set(import_cycles(graph)) == {frozenset("abc"), frozenset("de")}


def test_modules_have_no_import_cycles() -> None:
    """Imports inside functions and for type checking only count too: a cycle marks a definition in the wrong file."""
    graph: dict[str, set[str]] = {module_name(file): set() for file, _ in sources()}
    for file, tree in sources():
        graph[module_name(file)] |= {module for module, _ in imported_modules(tree) if module in graph}
    assert [" <-> ".join(sorted(cycle)) for cycle in import_cycles(graph)] == []


def test_no_module_imports_a_worker_module() -> None:
    """The registry names worker modules by string; they are imported only inside their venvs."""
    broken = [
        f"{file}:{line} imports {module}"
        for file, tree in sources()
        for module, line in imported_modules(tree)
        if _belongs_to_workers(module)
    ]
    assert broken == []


def test_only_settings_reads_environ() -> None:
    broken = []
    for file, tree in sources():
        if file == "settings.py" or file in RUN_BY_PATH:
            continue
        written = {id(value) for value in _assigned(tree)} if file in SET_ENVIRONMENT else set()
        for node in ast.walk(tree):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) and node.module == "os" else []
            )
            is_access = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv")
            if is_access and id(node) not in written:
                broken.append(f"{file}:{node.lineno}")
            if {"environ", "environb", "getenv"} & set(names):
                broken.append(f"{file}:{node.lineno}")
    assert broken == []


def test_what_runs_by_path_needs_only_the_standard_library() -> None:
    allowed = {*sys.stdlib_module_names, "template_client"}
    broken = [
        f"{file}:{node.lineno}"
        for file, tree in sources()
        if file in RUN_BY_PATH
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        if name.partition(".")[0] not in allowed
    ]
    assert broken == []


def _assigned(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield each mapping that is only written to: `x` in `x.update(...)` and in `x[name] = value`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update":
            yield node.func.value
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            yield node.value


def test_package_does_not_print() -> None:
    broken = [
        f"{file}:{node.lineno}"
        for file, tree in sources()
        if not file.startswith(MAY_PRINT)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert broken == []


def test_exceptions_outside_errors_stay_in_their_package() -> None:
    """An exception that another package imports must be part of the tree in `errors.py`."""
    private = {
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
        if alias.name in private and Path(file).parts[0] != private[alias.name]
    ]
    assert broken == []


def _is_plain_exception(node: ast.ClassDef) -> bool:
    bases = [getattr(builtins, base.id, object) for base in node.bases if isinstance(base, ast.Name)]
    return bool(bases) and all(isinstance(base, type) and issubclass(base, BaseException) for base in bases)


# Imports modules and reports every module that Python searched for: `try: import vllm` counts as an import of vllm.
_PROBE = """
import importlib, json, sys
class Recorder:
    names = set()
    def find_spec(self, name, path=None, target=None):
        self.names.add(name.partition(".")[0])
        return None
sys.meta_path.insert(0, Recorder())
for module in sys.argv[1:]:
    importlib.import_module(module)
sys.stdout.write(json.dumps(sorted(Recorder.names)))
"""


def imports_of(*modules: str) -> set[str]:
    """Return the top-level packages that importing `modules` in a new process imports or tries to import."""
    command = [sys.executable, "-c", _PROBE, *modules]
    process = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=800, check=False)
    assert process.returncode == 0, process.stderr
    return set(json.loads(process.stdout.splitlines()[-1]))


def modules_of(*packages: str) -> list[str]:
    names = [module_name(file) for file, _ in sources() if Path(file).parts[0] in packages]
    return [name for name in names if not name.endswith("__main__") and not _belongs_to_workers(name)]


def _belongs_to_workers(module: str) -> bool:
    """Return whether a module is imported only in a venv of its own."""
    return module.endswith("_worker") or ".environments.adapters." in module


def test_venvs_import_neither_ray_nor_torch() -> None:
    assert not {"ray", "torch"} & imports_of(*modules_of("venvs"))


@pytest.mark.parametrize("module", ["nemo_rl.cli", "nemo_rl.distributed.ray_actor_environment_registry"])
def test_command_line_and_registry_import_no_heavy_package(module: str) -> None:
    assert not {"ray", "torch", "transformers", "pydantic"} & imports_of(module)


def test_job_is_checked_and_planned_without_ray_and_torch() -> None:
    """A job imports them while Ray's processes start."""
    assert not {"ray", "torch", "transformers"} & imports_of(
        "nemo_rl.jobs.grpo_job",
        "nemo_rl.jobs.sft_job",
        "nemo_rl.jobs.dpo_job",
        "nemo_rl.jobs.reward_model_job",
        "nemo_rl.jobs.distillation_job",
        "nemo_rl.jobs.plan",
    )


def test_driver_imports_neither_vllm_nor_megatron() -> None:
    """The driver must not need them, even if its venv holds them."""
    loaded = imports_of(
        *modules_of(*DRIVER_PACKAGES), "nemo_rl.models.policy.interfaces", "nemo_rl.models.generation.interfaces"
    )
    assert "ray" in loaded  # the recorder works
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
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert json.loads(process.stdout) == [True, 1, ["nemo_rl"]]


def test_nodes_need_only_ray() -> None:
    """A node may have the driver's source, but of its packages only those that Ray needs."""
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('numpy', 'omegaconf', 'pydantic', 'rich', 'torch', 'transformers'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import nemo_rl.distributed.provisioning.broadcast_peer, nemo_rl.distributed.provisioning.node_task\n"
    )
    process = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
