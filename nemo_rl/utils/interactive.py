"""What an interactive session, such as a notebook, adds: names that the user has given, and statements run again."""

from __future__ import annotations

import dis
import inspect
import sys
from types import FrameType


def is_interactive() -> bool:
    """Return whether a prompt or a notebook runs the program, so that statements and files may change meanwhile."""
    return hasattr(sys, "ps1")


def names_of(value: object) -> list[str]:
    """Return the global names of the user's script or notebook that refer to `value`."""
    main = sys.modules.get("__main__")
    return [name for name, other in list(vars(main).items()) if other is value] if main is not None else []


def assigned_name(frame: FrameType) -> str | None:
    """Return the global name that gets the result of the call that `frame` is executing; None if there is none.

    Example: while `f` runs in the statement `x = f()` at the top level of a script, `x` for the script's frame.
    """
    # Not `f_locals` of a function: the dict that Python then creates keeps the values of all its variables.
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED or frame.f_locals is not frame.f_globals:
        return None  # in a function or class
    following = next((i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti), None)
    return following.argval if following is not None and following.opname in ("STORE_NAME", "STORE_GLOBAL") else None


def calling_frame(package: str) -> FrameType | None:
    """Return the innermost frame outside a package; None in a thread that the package has started."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] == package:
        frame = frame.f_back
    return frame
