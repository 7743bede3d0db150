"""Functions of tensors that run without the interpreter.

With a small model, an operation takes a few microseconds, and so does calling it from Python. Threads that call
operations wait for one another's interpreter after each of them. TorchScript runs a whole function without the
interpreter. Its successor, `torch.compile`, needs a C++ compiler on every node, and half a minute.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

logger = logging.getLogger(__name__)

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def compiled(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Compile a function to TorchScript.

    TorchScript reads annotations as types, so the module of the function has no `from __future__ import annotations`.

    Raises:
        TorchScriptError: this version of torch cannot compile it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated: see the module
            script: Any = torch.jit.script(function)
        without_profiling: Any = torch.jit.optimized_execution  # type: ignore[attr-defined]
    except Exception as error:  # torch raises many types, and new ones when TorchScript is gone
        raise TorchScriptError(f"{function.__qualname__}: {error}") from error

    @functools.wraps(function)
    def call(*arguments: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
        # Shapes vary, so code for particular shapes would be compiled again and again.
        with without_profiling(False):
            result: _Result = script(*arguments, **options)
        return result

    return call


def compiled_or_plain(make: Callable[[bool], _Result], what: str) -> tuple[_Result, bool]:
    """Return `make(True)`, which compiles functions; if torch cannot, `make(False)`, and whether they are compiled.

    Args:
        make: makes the functions; with True it calls `compiled`.
        what: names them in the log.
    """
    try:
        return make(True), True
    except TorchScriptError as error:
        logger.debug("%s run in Python: %s", what, error)
        return make(False), False


class TorchScriptError(Exception):
    """This version of torch cannot compile a function."""
