"""The worker host: the actor class that runs in a worker's process and forwards calls to the worker's class.

A worker's venv may lack `nemo_rl`. So this module uses only the standard library and ray, and it is pickled *by value*:
the driver sends its code, and the process in the venv never imports it. For the same reason it reads and writes
`os.environ` instead of using `nemo_rl.settings`.

::

    driver                                        process in the worker's venv
    ------                                        ----------------------------
    make_host_class(description) ── pickled ───▶  Host.__init__(launch, *args, **kwargs)
      a class with the worker's method names        1. set RANK etc. and the caller's variables
      and kinds; the worker's module is             2. attest: venv digest, Python, ray, node, pid
      not imported                                  3. import the module, compare the class with the description
    handle.method.remote(...) ───────────────────▶  4. construct the class; calls are forwarded to it

    group.cancel() ── CANCEL_SIGNAL ─────────────▶  interrupts the call in the main thread, drops those after it
      or, if the class has coroutines, nrl_cancel__   cancels all coroutines, drops those after them
    handle.nrl_resume__.remote() ────────────────▶  calls after it run again

Steps 2 and 3 do not raise for a mismatch. They record a `verdict` in the attestation and skip the following steps, so
that the driver can report the worker, the expected and the actual value. Errors of the worker's module and constructor
are raised unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

SCHEMA = 1
ATTEST_METHOD = "nrl_attest__"
CANCEL_METHOD = "nrl_cancel__"
RESUME_METHOD = "nrl_resume__"
CANCEL_GROUP = "nrl_cancel"  # concurrency group of both methods: they run while coroutines occupy all others
# Not SIGINT: Ray blocks it in its processes, so that Ctrl-C in the driver's terminal does not reach them.
CANCEL_SIGNAL = signal.SIGRTMIN + 7
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
# Special methods that Ray or the user of a handle looks up on the class.
_FORWARDED_SPECIAL_METHODS = frozenset({"__call__", "__repr__", "__ray_shutdown__"})


def load_class(fqn: str) -> tuple[type, dict[str, Any]]:
    """Import the class `package.module.Class` (or `...Outer.Inner`).

    Returns:
        The plain class and the options of its `@ray.remote(...)`; an empty dict without the decorator.

    Raises:
        ImportError: the module or class does not exist; lists the module's classes. Errors that the module raises are
            passed on unchanged.
    """
    target = load_object(fqn)
    metadata = getattr(target, "__ray_metadata__", None)
    if metadata is not None:
        return metadata.modified_class.__ray_actor_class__, dict(target._default_options)
    if not isinstance(target, type):
        raise ImportError(f"{fqn} is a {type(target).__name__}, not a class")
    return target, {}


def load_object(fqn: str) -> Any:
    """Import `package.module.name` (or `...Outer.Inner`). Raises the errors of `load_class`."""
    module, names = _import_longest_module(fqn)
    target: Any = module
    for name in names:
        if not hasattr(target, name):
            classes = sorted(key for key, value in vars(target).items() if _is_class_like(value))
            parent = getattr(target, "__name__", target)
            message = f"{fqn}: {parent!r} has no {name!r}. Its classes: {', '.join(classes) or 'none'}"
            if hasattr(target, "__path__"):
                modules = sorted(module.name for module in pkgutil.iter_modules(target.__path__))
                message += f"; its modules: {', '.join(modules) or 'none'}"
            raise ImportError(message)
        target = getattr(target, name)
    return target


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
            # Try a shorter name only if this module or one of its packages is missing, not a module that it imports.
            is_parent = error.name is not None and (name == error.name or name.startswith(error.name + "."))
            if not is_parent:
                raise
            first_error = first_error or error
    raise first_error or ImportError(f"{fqn!r} is not a fully qualified class name (package.module.Class)")


def describe_class(fqn: str, cls: type, ray_options: dict[str, Any]) -> dict[str, Any]:
    """Describe a class as plain JSON data, so that the driver can create and call workers without importing it."""
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
    """Hash the parts of a description that determine the host class and its calls; docstrings are excluded."""
    content = {key: value for key, value in description.items() if key not in ("doc", "digest")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _kind(function: Any) -> str:
    # Like Ray, test the member itself for async, but unwrap it before testing for a generator.
    if inspect.isasyncgenfunction(function):
        return "async_generator"
    if inspect.iscoroutinefunction(function):
        return "async"
    unwrapped = inspect.unwrap(function)
    if inspect.isgeneratorfunction(unwrapped):
        return "generator"
    return "plain"


def _parameters(function: Any, skip_first: bool) -> list[list[Any]] | None:
    """Return `[[name, kind, has a default], ...]`, or None if the signature cannot be read."""
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
        raise TypeError(f"{fqn}.{name}: methods with __ray_invocation_decorator__ are not supported")
    options = {key: getattr(function, key) for key in _RAY_METHOD_ATTRIBUTES if hasattr(function, key)}
    for key, value in options.items():
        if not _is_json(value):
            raise TypeError(
                f"{fqn}.{name}: the option {key.strip('_').removeprefix('ray_')}={value!r} of @ray.method is not JSON "
                "data, and the driver cannot import it. Pass it per call with .options(...)."
            )
    return options


def _plain_ray_options(fqn: str, options: dict[str, Any]) -> dict[str, Any]:
    plain = {}
    for key, value in options.items():
        if key in ("scheduling_strategy", "placement_group", "placement_group_bundle_index"):
            continue  # set when the worker is started
        value = dict(value) if key == "runtime_env" and value is not None else value
        if not _is_json(value):
            raise TypeError(f"{fqn}: the option {key}={value!r} of @ray.remote is not JSON data")
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
                "it is called before an instance exists"
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
    """Create a class with the described methods, kinds and signatures that forwards calls to the worker's class."""
    module, _, name = description["fqn"].rpartition(".")
    namespace: dict[str, Any] = {"__module__": module, "__doc__": description["doc"], "__qualname__": name}
    for method_name, method in description["methods"].items():
        namespace[method_name] = _forwarder(method_name, method)
    if has_coroutines(description):

        def cancel(self: Any) -> None:
            self._nrl_calls.cancel_coroutines()

        async def resume(self: Any) -> None:
            await self._nrl_calls.resume_when_idle()

        functions: dict[str, Any] = {CANCEL_METHOD: cancel, RESUME_METHOD: resume}
        for function in functions.values():
            function.__ray_concurrency_group__ = CANCEL_GROUP
        namespace.update(functions)
    return type(name, (WorkerHost,), namespace)


def has_coroutines(description: dict[str, Any]) -> bool:
    """Return whether Ray runs the methods of the described class in an event loop, not in the main thread."""
    return any(method["kind"].startswith("async") for method in description["methods"].values())


def _forwarder(name: str, method: dict[str, Any]) -> Callable[..., Any]:
    async def forward_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._nrl_calls.coroutine():
            return await getattr(self._nrl_worker, name)(*args, **kwargs)

    async def forward_async_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._nrl_calls.coroutine():
            async for item in getattr(self._nrl_worker, name)(*args, **kwargs):
                yield item

    def forward_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        items = iter(getattr(self._nrl_worker, name)(*args, **kwargs))
        # Not `yield from`: Ray sends values into the generator, which plain iterators do not support.
        while (item := self._nrl_calls.run(next, items, _END)) is not _END:
            yield item

    def forward_plain(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._nrl_calls.run(getattr(self._nrl_worker, name), *args, **kwargs)

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
        # Ray checks the arguments of a call against the signature, in the driver.
        forward.__signature__ = signature_of(method["parameters"], self_parameter)  # type: ignore[attr-defined]
    for key, value in method["ray"].items():
        setattr(forward, key, value)
    return forward


def signature_of(parameters: list[list[Any]], *first: inspect.Parameter) -> inspect.Signature:
    """Rebuild a signature from the result of `_parameters`. Defaults are `None`: only their presence is known."""
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


_END = object()
_CLEANUP_S = 5.0  # seconds between two interrupts of one call
_QUIET_S = 0.5  # seconds without a dropped coroutine after which none is waiting any more


class _Calls:
    """Tracks the calls that run in this process, so that the driver can cancel them.

    Ray runs plain methods in the main thread, where Python also runs signal handlers: the handler raises in the call.
    Methods in other threads, those of an actor with `max_concurrency` and without coroutines, are not interrupted.
    """

    def __init__(self) -> None:
        self._main_thread = threading.main_thread().ident
        self._is_running = False  # a call, in the main thread
        self._interrupted_at = -_CLEANUP_S
        self._is_cancelling = False
        self._coroutines: set[asyncio.Task[Any]] = set()
        self._dropped_at = 0.0

    def listen(self) -> bool:
        """Handle `CANCEL_SIGNAL`. Returns False where that is impossible: Ray constructs some actors in a thread."""
        if threading.get_ident() != self._main_thread:
            return False
        signal.signal(CANCEL_SIGNAL, self._interrupt)
        return True

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function`. Raises `TaskCancelledError` if the driver cancels the call before it has returned."""
        if threading.get_ident() != self._main_thread:
            return function(*args, **kwargs)
        if self._is_cancelling:
            raise _cancelled()
        try:
            self._interrupted_at = -_CLEANUP_S
            self._is_running = True
            result = function(*args, **kwargs)
            self._is_running = False
            return result
        except BaseException as error:
            self._is_running = False
            if self._is_cancelling and isinstance(error, KeyboardInterrupt):
                raise _cancelled() from None
            raise

    @contextlib.contextmanager
    def coroutine(self) -> Iterator[None]:
        """Track the current coroutine while the block runs. A cancelled one raises `TaskCancelledError`."""
        if self._is_cancelling:
            self._dropped_at = time.monotonic()
            raise _cancelled()
        task = asyncio.current_task()
        if task is not None:
            self._coroutines.add(task)
        try:
            yield
        except asyncio.CancelledError:
            raise _cancelled() from None
        finally:
            self._coroutines.discard(task)  # type: ignore[arg-type]

    def cancel_coroutines(self) -> None:
        """Cancel the coroutines that run, and those that start before `resume_when_idle` returns."""
        self._is_cancelling, self._dropped_at = True, time.monotonic()
        for task in list(self._coroutines):
            task.get_loop().call_soon_threadsafe(task.cancel)

    def resume(self) -> None:
        """Run the calls that arrive from now on."""
        self._is_cancelling = False

    async def resume_when_idle(self) -> None:
        """Run the calls that arrive from now on, once the coroutines before them have ended.

        Ray does not start waiting coroutines in their order, so a later call says nothing about the earlier ones.
        """
        while self._coroutines or time.monotonic() < self._dropped_at + _QUIET_S:
            await asyncio.sleep(_QUIET_S / 20)
        self.resume()

    def _interrupt(self, *_: object) -> None:
        self._is_cancelling = True
        # The driver repeats the signal. The call gets time to clean up; an interrupt may also be lost in a destructor.
        if self._is_running and time.monotonic() >= self._interrupted_at + _CLEANUP_S:
            self._interrupted_at = time.monotonic()
            raise KeyboardInterrupt


def _cancelled() -> Exception:
    from ray.exceptions import TaskCancelledError

    return TaskCancelledError(error_message="The driver has cancelled this call.")


class WorkerHost:
    """Base of every generated host class; see the docstring of this module."""

    _nrl_worker: Any

    def __init__(self, nrl_launch__: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        os.environ.update(nrl_launch__["env_vars"])
        phases = _Phases()
        attestation = attest(nrl_launch__)
        attestation["phases"] = phases.ended
        phases.end("Ray worker starts")
        calls = _Calls()
        has_cancel = hasattr(self, CANCEL_METHOD)
        attestation["cancelled_by"] = "method" if has_cancel else "signal" if calls.listen() else None
        # Use __dict__, because attribute access is forwarded to the worker.
        self.__dict__.update(_nrl_attestation=attestation, _nrl_worker=None, _nrl_calls=calls)
        if attestation["verdict"] != "ok":
            return
        with _gc_disabled():
            cls, ray_options = load_class(nrl_launch__["fqn"])
        description = describe_class(nrl_launch__["fqn"], cls, ray_options)
        if description["digest"] != nrl_launch__["description_digest"]:
            attestation.update(verdict="stale description", description=description)
            return
        phases.end("import")
        attestation["module_file"] = getattr(sys.modules.get(cls.__module__), "__file__", None)
        self.__dict__["_nrl_worker"] = cls(*args, **kwargs)
        phases.end("construct")

    def nrl_attest__(self) -> dict[str, Any]:
        """Return the attestation of this process. Ray runs this only after the worker's constructor has returned."""
        return self.__dict__["_nrl_attestation"]

    def nrl_resume__(self) -> None:
        """End a cancellation. The driver calls this after it has cancelled the earlier calls."""
        self.__dict__["_nrl_calls"].resume()

    def __getattr__(self, name: str) -> Any:
        # Closures that run on the actor (`handle.__ray_call__`) see the worker's attributes.
        if name.startswith("__") or "_nrl_worker" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_nrl_worker"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        target = self.__dict__.get("_nrl_worker")
        if target is None:  # not constructed yet, or Ray's subclass in the driver
            object.__setattr__(self, name, value)
        else:
            setattr(target, name, value)


@contextlib.contextmanager
def _gc_disabled() -> Iterator[None]:
    """Disable garbage collection during an import: it would scan objects repeatedly that all stay alive."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


class _Phases:
    """Records the phases of this process since its creation: `ended` holds [name, start, end], in epoch seconds."""

    def __init__(self) -> None:
        self.ended: list[list[Any]] = []
        self._start = _process_start()

    def end(self, name: str) -> None:
        """End the phase `name` and start the next one."""
        now = time.time()
        self.ended.append([name, self._start, now])
        self._start = now


def _process_start() -> float:
    """Return when the kernel started this process, in seconds of the epoch, to a hundredth of a second."""
    ticks = start_ticks(os.getpid())
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def start_ticks(pid: int) -> int:
    """Return when the kernel started a process, in ticks since boot. With the pid, it identifies the process."""
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return int(file.read().rpartition(")")[2].split()[19])  # field 22 of proc(5), `starttime`


def attest(launch: dict[str, Any]) -> dict[str, Any]:
    """Describe this process and compare it with the launch (`verdict`: "ok", or the differences)."""
    import ray

    actual = {
        "venv_digest": venv_digest(),
        "python": platform.python_version(),
        "ray": ray.__version__,
    }
    mismatches = [
        f"{key}: expected {expected}, found {actual[key]}"
        for key, expected in launch["expected"].items()
        if expected is not None and actual[key] != expected
    ]
    return {
        **actual,
        "verdict": "; ".join(mismatches) or "ok",
        "executable": sys.executable,
        "prefix": sys.prefix,
        "fqn": launch["fqn"],
        "node_id": ray.get_runtime_context().get_node_id(),
        "node_ip": ray.util.get_node_ip_address(),
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
        "start_ticks": start_ticks(os.getpid()),
    }


def venv_digest() -> str | None:
    """Return the digest in the manifest of this interpreter's venv; None outside venvs that nemo_rl built."""
    try:
        with open(os.path.join(sys.prefix, MANIFEST_NAME), encoding="utf-8") as file:
            return json.load(file)["digest"]
    except FileNotFoundError:
        return None


class ClassInspector:
    """Imports a worker's module in the worker's venv and describes its class."""

    def __init__(self, env_vars: dict[str, str]) -> None:
        os.environ.update(env_vars)

    def describe(self, fqn: str) -> dict[str, Any]:
        """Describe the class `fqn`; see `describe_class`."""
        with _gc_disabled():
            return describe_class(fqn, *load_class(fqn))

    def configure(self, fqn: str, calls: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        """Return `fqn.configure_worker(**call)` for every call."""
        with _gc_disabled():
            cls, _ = load_class(fqn)
        return [cls.configure_worker(**call) for call in calls]  # type: ignore[attr-defined]
