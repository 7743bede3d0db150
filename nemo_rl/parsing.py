"""Python's parser for several threads.

Python 3.11 and 3.12 keep the nesting depth of all calls of `ast.parse` in one counter per interpreter. If the
garbage collector runs in the middle of a call and lets another thread parse, the first call finds a wrong depth and
raises `SystemError: AST constructor recursion depth mismatch`, whatever its text is. This module parses one text at a
time.
"""

from __future__ import annotations

import ast
import threading

# Hold it around any library call that uses `ast.parse`. A finalizer may parse during a parse of its own thread.
PARSER_LOCK = threading.RLock()


def parse_module(source: str | bytes, *, filename: str = "<unknown>") -> ast.Module:
    """Parse a module. Raises `SyntaxError`."""
    with PARSER_LOCK:
        return ast.parse(source, filename=filename)


def parse_expression(source: str) -> ast.expr:
    """Parse one expression. Raises `SyntaxError`."""
    with PARSER_LOCK:
        return ast.parse(source, mode="eval").body
