"""What runs inside a worker's own process, before and around the worker's class.

A worker's venv need not hold `nemo_rl`. So this module uses the standard library and ray only, and it is pickled *by
value*: the driver sends its code along, and the process in the venv never imports it. For the same reason it reads and
writes `os.environ` itself instead of asking `nemo_rl.settings`.

::

    driver                                        process in the worker's venv
    ------                                        ----------------------------
    make_host_class(description) ── pickled ───▶  Host.__init__(launch, *args, **kwargs)
      a class with the worker's method names        1. set RANK & co. and the caller's variables
      and kinds; nothing of the worker's            2. attest: venv digest, Python, ray, node, pid
      module is imported                            3. import the module, compare the class with the description
    handle.method.remote(...) ───────────────────▶  4. construct the class; calls are forwarded to it

Steps 2 and 3 never raise for a mismatch: they leave a `verdict` in the attestation and skip the rest, so that the
driver can say which worker, what it expected and what it found. Everything that the worker's own module or constructor
raises is raised unchanged.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import inspect
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

SCHEMA = 1
ATTEST_METHOD = "nrl_attest__"
MANIFEST_NAME = "nemo_rl_venv.json"  # nemo_rl.venvs.storage.manifest.MANIFEST_FILE

_RAY_METHOD_ATTRIBUTES = (
    "__ray_num_returns__",
    "__ray_max_task_retries__",
    "__ray_retry_exceptions__",
    "__ray_concurrency_group__",
    "__ray_generator_backpressure_num_objects__",
    "__ray_num_objects_per_yield__",
    "__ray_enable_task_events__",
    "__ray_tensor_transport__",
)
# Special methods that Ray or a caller of a handle looks for on the class itself.
_FORWARDED_SPECIAL_METHODS = frozenset({"__call__", "__repr__", "__ray_shutdown__"})


def load_class(fqn: str) -> tuple[type, dict[str, Any]]:
    """Import the class `package.module.Class` (or `...Outer.Inner`).

    Returns:
        The plain class and the options of its `@ray.remote(...)`; an empty dict when it has no such decorator.

    Raises:
        ImportError: no such module or class, saying what the module has. Errors of the module itself pass unchanged.
    """
    module, names = _import_longest_module(fqn)
    target: Any = module
    for name in names:
        if not hasattr(target, name):
            classes = sorted(key for key, value in vars(target).items() if _is_class_like(value))
            owner = getattr(target, "__name__", target)
            raise ImportError(f"{fqn}: {owner!r} has no {name!r}. Its classes: {', '.join(classes) or 'none'}")
        target = getattr(target, name)
    metadata = getattr(target, "__ray_metadata__", None)
    if metadata is not None:
        return metadata.modified_class.__ray_actor_class__, dict(target._default_options)
    if not isinstance(target, type):
        raise ImportError(f"{fqn} is a {type(target).__name__}, not a class")
    return target, {}


def _is_class_like(value: object) -> bool:
    return isinstance(value, type) or hasattr(value, "__ray_metadata__")


def _import_longest_module(fqn: str) -> tuple[ModuleType, list[str]]:
    parts = fqn.split(".")
    first_error: ImportError | None = None
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            return importlib.import_module(name), parts[cut:]
        except ModuleNotFoundError as error:
            # Only when it is this module (or a package on the way to it) that is missing, not something it imports.
            is_parent = error.name is not None and (name == error.name or name.startswith(error.name + "."))
            if not is_parent:
                raise
            first_error = first_error or error
    raise first_error or ImportError(f"{fqn!r} is not a fully qualified class name (package.module.Class)")


def describe_class(fqn: str, cls: type, ray_options: dict[str, Any]) -> dict[str, Any]:
    """What the driver must know about a class to create and call workers without importing it, as plain JSON data."""
    methods = {}
    for name, function in inspect.getmembers(cls, lambda value: inspect.isfunction(value) or inspect.ismethod(value)):
        if name.startswith("__") and name.endswith("__") and name not in _FORWARDED_SPECIAL_METHODS:
            continue
        raw = inspect.getattr_static(cls, name)
        is_bound = isinstance(raw, (staticmethod, classmethod))
        methods[name] = {
            "kind": _kind(function),
            "parameters": _parameters(function, skip_first=not is_bound),
            "ray": _ray_method_options(fqn, name, inspect.unwrap(function)),
        }
    description = {
        "schema": SCHEMA,
        "fqn": fqn,
        "doc": inspect.getdoc(cls) or "",
        "methods": methods,
        "init": _parameters(cls, skip_first=False),
        "ray_options": _plain_ray_options(fqn, ray_options),
        "configure_worker": _configure_worker(cls),
    }
    description["digest"] = digest_of(description)
    return description


def digest_of(description: dict[str, Any]) -> str:
    """What decides the host class and its calls. Documentation does not."""
    content = {key: value for key, value in description.items() if key not in ("doc", "digest")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _kind(function: Any) -> str:
    # The same questions that Ray asks: async-ness of the member itself, generator-ness of what it wraps.
    if inspect.isasyncgenfunction(function):
        return "async_generator"
    if inspect.iscoroutinefunction(function):
        return "async"
    unwrapped = inspect.unwrap(function)
    if inspect.isgeneratorfunction(unwrapped):
        return "generator"
    return "plain"


def _parameters(function: Any, skip_first: bool) -> list[list[Any]] | None:
    """[[name, kind, has a default], ...]; None when the signature cannot be read."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    if skip_first:
        variadic = parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL
        parameters = parameters if variadic else parameters[1:]
    return [
        [p.name, p.kind.name, p.default is not inspect.Parameter.empty]
        for p in parameters
        if p.name != "_ray_trace_ctx"  # Ray's tracing adds it to decorated classes
    ]


def _ray_method_options(fqn: str, name: str, function: Any) -> dict[str, Any]:
    if hasattr(function, "__ray_invocation_decorator__"):
        raise TypeError(f"{fqn}.{name}: a method with __ray_invocation_decorator__ cannot be called by description")
    options = {key: getattr(function, key) for key in _RAY_METHOD_ATTRIBUTES if hasattr(function, key)}
    for key, value in options.items():
        if not _is_json(value):
            raise TypeError(
                f"{fqn}.{name}: the option {key.strip('_').removeprefix('ray_')}={value!r} of @ray.method is not plain "
                "data; the driver cannot import it. Give it per call with .options(...) instead."
            )
    return options


def _plain_ray_options(fqn: str, options: dict[str, Any]) -> dict[str, Any]:
    plain = {}
    for key, value in options.items():
        if key in ("scheduling_strategy", "placement_group", "placement_group_bundle_index"):
            continue  # always set by whoever starts the worker
        value = dict(value) if key == "runtime_env" and value is not None else value
        if not _is_json(value):
            raise TypeError(f"{fqn}: the option {key}={value!r} of @ray.remote is not plain data")
        plain[key] = value
    return plain


def _configure_worker(cls: type) -> dict[str, Any] | None:
    for base in cls.__mro__:
        raw = base.__dict__.get("configure_worker")
        if raw is None:
            continue
        if not isinstance(raw, (staticmethod, classmethod)):
            raise TypeError(
                f"{cls.__module__}.{cls.__qualname__}.configure_worker must be a staticmethod or a classmethod: "
                "it is called before there is an instance"
            )
        return {"fqn": f"{base.__module__}.{base.__qualname__}", "is_static": isinstance(raw, staticmethod)}
    return None


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def make_host_class(description: dict[str, Any]) -> type:
    """A class with the described methods, of the same kinds and signatures, that forwards to the real one."""
    module, _, name = description["fqn"].rpartition(".")
    namespace: dict[str, Any] = {"__module__": module, "__doc__": description["doc"], "__qualname__": name}
    for method_name, method in description["methods"].items():
        namespace[method_name] = _forwarder(method_name, method)
    return type(name, (WorkerHost,), namespace)


def _forwarder(name: str, method: dict[str, Any]) -> Callable[..., Any]:
    async def forward_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await getattr(self._nrl_worker, name)(*args, **kwargs)

    async def forward_async_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        async for item in getattr(self._nrl_worker, name)(*args, **kwargs):
            yield item

    def forward_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Not `yield from`: Ray sends values into the generator, which plain iterators do not take.
        for item in getattr(self._nrl_worker, name)(*args, **kwargs):  # noqa: UP028
            yield item

    def forward_plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._nrl_worker, name)(*args, **kwargs)

    kinds: dict[str, Callable[..., Any]] = {
        "async": forward_async,
        "async_generator": forward_async_generator,
        "generator": forward_generator,
        "plain": forward_plain,
    }
    forward = kinds[method["kind"]]
    forward.__name__ = forward.__qualname__ = name
    if method["parameters"] is not None:
        self_parameter = inspect.Parameter("nrl_self__", inspect.Parameter.POSITIONAL_ONLY)
        # Ray checks a call's arguments against the signature, in the driver.
        forward.__signature__ = signature_of(method["parameters"], self_parameter)  # type: ignore[attr-defined]
    for key, value in method["ray"].items():
        setattr(forward, key, value)
    return forward


def signature_of(parameters: list[list[Any]], *first: inspect.Parameter) -> inspect.Signature:
    """The signature that `_parameters` wrote down. Defaults are `None`: only their presence is known."""
    return inspect.Signature(
        [
            *first,
            *(
                inspect.Parameter(
                    name, getattr(inspect.Parameter, kind), default=None if has_default else inspect.Parameter.empty
                )
                for name, kind, has_default in parameters
            ),
        ]
    )


class WorkerHost:
    """Base of every generated host class; see the top of this module."""

    _nrl_worker: Any

    def __init__(self, nrl_launch__: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        os.environ.update(nrl_launch__["env_vars"])
        phases = _Phases()
        attestation = attest(nrl_launch__)
        attestation["phases"] = phases.ended
        phases.end("Ray worker starts")
        # Through __dict__, because attribute access is forwarded to the worker.
        self.__dict__.update(_nrl_attestation=attestation, _nrl_worker=None)
        if attestation["verdict"] != "ok":
            return
        with _collecting_later():
            cls, ray_options = load_class(nrl_launch__["fqn"])
        found = describe_class(nrl_launch__["fqn"], cls, ray_options)
        if found["digest"] != nrl_launch__["description_digest"]:
            attestation.update(verdict="stale description", description=found)
            return
        phases.end("import")
        attestation["module_file"] = getattr(sys.modules.get(cls.__module__), "__file__", None)
        self.__dict__["_nrl_worker"] = cls(*args, **kwargs)
        phases.end("construct")

    def nrl_attest__(self) -> dict[str, Any]:
        """What this process is. Answers only after the worker's constructor has returned."""
        return self.__dict__["_nrl_attestation"]

    def __getattr__(self, name: str) -> Any:
        # For closures that run on the actor (`handle.__ray_call__`): they see the worker's own attributes.
        if name.startswith("__") or "_nrl_worker" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_nrl_worker"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        target = self.__dict__.get("_nrl_worker")
        if target is None:  # not constructed yet, or Ray's own subclass in the driver
            object.__setattr__(self, name, value)
        else:
            setattr(target, name, value)


@contextlib.contextmanager
def _collecting_later() -> Iterator[None]:
    """Import without garbage collection: it would look again and again at objects that all stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


class _Phases:
    """What this process has done since it was created: `ended` holds [name, start, end], seconds since the epoch."""

    def __init__(self) -> None:
        self.ended: list[list[Any]] = []
        self._start = _process_start()

    def end(self, name: str) -> None:
        """The phase `name` ends now, and the next one starts."""
        now = time.time()
        self.ended.append([name, self._start, now])
        self._start = now


def _process_start() -> float:
    """When the kernel started this process, to a hundredth of a second."""
    with open("/proc/self/stat", encoding="utf-8") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])  # field 22 of proc(5), `starttime`
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def attest(launch: dict[str, Any]) -> dict[str, Any]:
    """What this process is, and whether that is what was asked for (`verdict`: "ok" or what differs)."""
    import ray

    found = {
        "venv_digest": venv_digest(),
        "python": platform.python_version(),
        "ray": ray.__version__,
    }
    mismatches = [
        f"{key}: expected {expected}, found {found[key]}"
        for key, expected in launch["expected"].items()
        if expected is not None and found[key] != expected
    ]
    return {
        **found,
        "verdict": "; ".join(mismatches) or "ok",
        "executable": sys.executable,
        "prefix": sys.prefix,
        "fqn": launch["fqn"],
        "node_id": ray.get_runtime_context().get_node_id(),
        "node_ip": ray.util.get_node_ip_address(),
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
    }


def venv_digest() -> str | None:
    """The digest in the manifest of the venv that this interpreter runs from; None outside the engine's venvs."""
    try:
        with open(os.path.join(sys.prefix, MANIFEST_NAME), encoding="utf-8") as file:
            return json.load(file)["digest"]
    except FileNotFoundError:
        return None


class ClassInspector:
    """Imports a worker's module in the worker's venv, so that nobody else has to."""

    def __init__(self, env_vars: dict[str, str]) -> None:
        os.environ.update(env_vars)

    def describe(self, fqn: str) -> dict[str, Any]:
        """See `describe_class`."""
        with _collecting_later():
            return describe_class(fqn, *load_class(fqn))

    def configure(self, fqn: str, calls: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        """The answers of `fqn.configure_worker(**call)` for every call.

        A static method is evaluated on the class that defines it, so that only that class's module is imported.
        """
        with _collecting_later():
            cls, _ = load_class(fqn)
        return [cls.configure_worker(**call) for call in calls]  # type: ignore[attr-defined]
