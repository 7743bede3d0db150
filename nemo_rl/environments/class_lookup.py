"""Finds mistakes in `env.<name>.class` and `env.<name>.config` by reading source files, before a worker starts.

No code of an environment runs here: its module may need packages that only its own venv has. Its file is searched for
like an import would, and parsed. What the source does not tell for certain, such as a name that comes from `import *`,
is left to the worker.
"""

from __future__ import annotations

import ast
import os
import pkgutil
import sys
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from nemo_rl.errors import ConfigError
from nemo_rl.parsing import parse_module
from nemo_rl.utils.names import abbreviated, did_you_mean

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# A module that contains one of these may define any name.
_DYNAMIC = frozenset({"globals", "vars", "locals", "exec", "eval", "setattr", "modules", "__getattr__", "__dict__"})


def check_class(
    where: str, fqn: str, config: Collection[str], *, in_driver_python: bool, search_path: Sequence[str] = ()
) -> None:
    """Check that the class or function of an environment exists and accepts its configuration.

    Args:
        where: what messages call the environment, such as "env.<name>".
        fqn: `package.module.name`.
        config: names of the keyword arguments.
        in_driver_python: whether the environment runs in the driver's Python. Another Python may have other versions of
            installed packages, so then only files outside of these are read.
        search_path: directories that its workers search in addition to those of the driver.

    Raises:
        ConfigError: there is no such module or name, the module is no valid Python, or an argument is wrong.
    """
    subject = f"{where}.class={fqn}"
    module = _find_module(fqn.split("."), search_path)
    if not in_driver_python and (module.spec is None or not _is_outside_packages(module.spec)):
        return
    if module.spec is None:
        top = module.rest[0]
        directories = [*search_path, *sys.path, os.getcwd()]
        hint = did_you_mean(top, [found.name for found in pkgutil.iter_modules(directories)])
        raise ConfigError(
            f"{subject}: the driver's Python, in which {where} runs, finds no module {top!r}.{hint} Install its "
            f"package, add its directory to PYTHONPATH, or choose a Python that has it by {where}.py_executable."
        )
    if not module.rest:
        raise ConfigError(f"{subject} is a module. Add the name of the class or function.")
    source = _Source({})
    if module.spec.origin is not None:
        if not (module.spec.has_location and module.spec.origin.endswith(".py")):
            return  # a module without source
        try:
            source = _read(Path(module.spec.origin))
        except SyntaxError as error:
            if not in_driver_python:
                return
            raise ConfigError(f"{subject}: {module.spec.origin}:{error.lineno}: {error.msg}") from None
    name, *inner = module.rest
    if name not in source.names and not source.is_open:
        kind, known = "", [*source.definitions, *module.submodules]
        if inner and module.spec.submodule_search_locations is not None:
            kind, known = "module ", list(module.submodules)
        place = module.spec.origin or f"the package {module.spec.name}"
        raise ConfigError(
            f"{subject}: {place} has no {kind}{name!r}.{did_you_mean(name, known)} It has: "
            f"{abbreviated(sorted(known), 8)}."
        )
    if not inner and isinstance(definition := source.definitions.get(name), _Definition):
        _check_arguments(f"{where}.config", definition, config)


@dataclass(frozen=True)
class _Module:
    """The deepest module of a dotted name.

    Attributes:
        spec: the module; None if there is not even the first one.
        rest: the names behind the module.
        submodules: names of its modules, if it is a package.
    """

    spec: ModuleSpec | None
    rest: list[str]
    submodules: tuple[str, ...] = ()


def _find_module(parts: list[str], search_path: Sequence[str]) -> _Module:
    """Find a module without importing it or its packages."""
    module = _Module(None, parts)
    directories: Sequence[str] | None = None
    for index in range(len(parts)):
        spec = _find_spec(".".join(parts[: index + 1]), directories, search_path)
        if spec is None:
            break
        directories = spec.submodule_search_locations
        submodules = tuple(found.name for found in pkgutil.iter_modules(directories or ()))
        module = _Module(spec, parts[index + 1 :], submodules)
        if directories is None:
            break
    return module


def _find_spec(name: str, directories: Sequence[str] | None, search_path: Sequence[str]) -> ModuleSpec | None:
    """Find a module in the package with these directories; None: a module of the search path."""
    if directories is None and search_path and (spec := PathFinder.find_spec(name, search_path)) is not None:
        return spec
    try:
        for finder in sys.meta_path:
            if (spec := finder.find_spec(name, directories)) is not None:
                return spec
    except KeyError:  # a namespace package in a package that has not been imported
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [
            os.path.join(directory, name.rpartition(".")[2]) for directory in directories or ()
        ]
        return spec
    # Ray's workers also search the working directory of the driver.
    return PathFinder.find_spec(name, [os.getcwd()]) if directories is None else None


def _is_outside_packages(spec: ModuleSpec) -> bool:
    """Return whether a module belongs neither to the standard library nor to installed packages."""
    library = tuple(os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib"))
    places = [spec.origin] if spec.origin is not None else list(spec.submodule_search_locations or ())
    return any(
        os.path.exists(place)
        and not place.startswith(library)
        and not {"site-packages", "dist-packages"} & {*place.split(os.sep)}
        for place in places
    )


@dataclass(frozen=True)
class _Source:
    """What the source of a module defines.

    Attributes:
        definitions: its classes and functions; None for a name that is also defined otherwise.
        others: names that it imports or assigns.
        is_open: whether it may define further names.
    """

    definitions: dict[str, _Definition | None]
    others: frozenset[str] = frozenset()
    is_open: bool = False

    @property
    def names(self) -> set[str]:
        return {*self.definitions, *self.others}


def _read(path: Path) -> _Source:
    """Parse a module. Raises `SyntaxError`."""
    tree = parse_module(path.read_bytes(), filename=str(path))
    definitions: dict[str, _Definition | None] = {}
    others: set[str] = set()
    is_open = False
    for node in _module_level(tree):
        if isinstance(node, _Definition):
            definitions[node.name] = None if node.name in definitions else node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.asname or alias.name.partition(".")[0] for alias in node.names]
            is_open |= "*" in names
            others.update(names)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            others.add(node.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            others.update(node.names)
        used = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
        is_open |= used in _DYNAMIC
    definitions.update(dict.fromkeys(definitions.keys() & others))
    return _Source(definitions, frozenset(others), is_open)


def _module_level(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below `node`, without the insides of functions and classes."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, _Definition | ast.Lambda):
            yield from _module_level(child)


def _check_arguments(where: str, definition: _Definition, config: Collection[str]) -> None:
    """Check the names of keyword arguments, if the signature is in the source."""
    if definition.decorator_list:
        return
    if isinstance(definition, ast.ClassDef):
        methods = [node for node in definition.body if isinstance(node, ast.FunctionDef)]
        if any(method.name == "episode_factory" for method in methods):
            return  # it receives the arguments
        constructors = [node for node in methods if node.name in ("__init__", "__new__")]
        if definition.keywords or [node.name for node in constructors] != ["__init__"]:
            return
        function: ast.FunctionDef | ast.AsyncFunctionDef = constructors[0]
        num_given = 1  # `self`
        if function.decorator_list:
            return
    else:
        function, num_given = definition, 2  # a scoring function receives the completion and the answer
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    if arguments.vararg is not None or arguments.kwarg is not None:
        return
    known = [argument.arg for argument in [*positional[num_given:], *arguments.kwonlyargs]]
    for name in config:
        if name not in known:
            raise ConfigError(
                f"{where}.{name}: {definition.name} has no argument {name!r}.{did_you_mean(name, known)} Its "
                f"arguments: {', '.join(known) or 'none'}."
            )
    num_required = len(positional) - len(arguments.defaults)
    required = [argument.arg for argument in positional[num_given:num_required]]
    required += [a.arg for a, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value is None]
    missing = [name for name in required if name not in config]
    if missing:
        raise ConfigError(f"{where}: {definition.name} needs the argument {missing[0]!r}")
