"""The process that decides whether two mathematical answers are equal; `verify_pool` starts and kills it.

It reads one JSON request per line and answers each with one JSON line::

    {"op": "verify", "answer": ..., "truth": ...}  ->  {"result": "equal" | "different" | "unparseable" | "crashed"}
    {"op": "check", "truth": ...}                  ->  {"result": "parsed" | "unparseable" | "crashed"}

The text comes from a model and must be treated as hostile: parsing `9^{9^{9^9}}` can take forever, use all memory or
overflow the C stack. This process does not try to survive that. It is disposable: the parent limits its computing time
and kills it, and the kernel limits its memory and, if the parent dies, its CPU time. So math-verify's own time-outs
(signals, in steps of one second, ineffective inside long C calls) are off.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
import sys
from typing import Any, BinaryIO

from nemo_rl.environments.answers import braces_match, has_adjacent_numbers, has_huge_exponent

# Parsed texts that are kept. A process answers 2,000 requests at most; see `verify_pool`.
_MAX_CACHED = 1000
SELF_TEST = (
    ("\\frac{1}{2}", "0.5", "equal"),
    ("1", "2", "different"),
    ("\\{2, 1\\}", "\\{1, 2\\}", "equal"),
    ("2^{-99}", "2^{-98}", "different"),
)


class Verifier:
    """Checks ground truths and compares answers with math-verify. Raises only `MemoryError`."""

    def __init__(self) -> None:
        # Imported here, not at the top: the process sets its limits first.
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import parser
        from math_verify.grader import verify

        from nemo_rl.environments import equality

        equality.install()
        # The text contains only the answer, so one rule is enough, and no rule searches for an answer in prose.
        # Units have been removed before; math-verify would also remove products of variables, such as `ab` in `3ab`.
        normalization = NormalizationConfig(units=False, malformed_operators=True, nits=True)
        self._rules = [parser.LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)]
        self._parse = parser.parse
        self._verify = verify
        self._read = functools.lru_cache(maxsize=_MAX_CACHED)(self._read_text)
        for name in ("math_verify", "latex2sympy2_extended"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def check(self, truth: str) -> str:
        """Return whether answers can be compared with a ground truth: "parsed" or "unparseable".

        If a truth can be parsed, but takes forever to compare with a plain number, this call times out.
        """
        if not self._read(truth):
            return "unparseable"
        self.verify("1", truth)
        return "parsed"

    def verify(self, answer: str, truth: str) -> str:
        """Compare a model's answer with a ground truth that `check` accepted: "equal", "different" or "unparseable"."""
        expression = self._read(answer)
        if not expression:
            return "unparseable"
        try:
            equal = self._verify(self._read(truth), expression, timeout_seconds=None, raise_on_error=True)
        except MemoryError:
            raise
        except Exception:
            # sympy raises many types for expressions that cannot be compared (NotImplementedError, TypeError,
            # RecursionError, ...). The truth was parsed, so the answer is the cause: a wrong answer.
            return "unparseable"
        return "equal" if equal else "different"

    def _read_text(self, text: str) -> list[Any]:
        # Ground truths repeat: parsing one takes a quarter of a comparison. No caller changes the result.
        # `5} \boxed{7` must not inject a second answer into the box.
        if not braces_match(text) or has_adjacent_numbers(text) or has_huge_exponent(text):
            return []
        try:
            return self._parse(
                f"\\boxed{{{text}}}",
                self._rules,
                fallback_mode="no_fallback",
                parsing_timeout=None,
                raise_on_error=True,
            )
        except MemoryError:
            raise
        except Exception:
            return []  # the parser raises the same types


def _limit_memory(growth_bytes: int) -> None:
    """Limit the address space to its current size plus `growth_bytes`."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + growth_bytes, in_use + growth_bytes))


def _limit_cpu(seconds: float) -> None:
    """Let the kernel kill this process after `seconds` more of CPU time, in case the parent is dead."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _serve(verifier: Verifier, requests: BinaryIO, replies: BinaryIO, timeout_s: float) -> None:
    for line in requests:
        request = json.loads(line)
        _limit_cpu(2 * timeout_s)
        try:
            if request["op"] == "verify":
                result = verifier.verify(request["answer"], request["truth"])
            else:
                result = verifier.check(request["truth"])
        except MemoryError:
            result = "crashed"  # out of memory: the parent replaces this process
        replies.write(json.dumps({"result": result}).encode() + b"\n")
        replies.flush()


def main(timeout_s: float, memory_limit_mb: int) -> None:
    """Serve standard input until it ends. The first line written reports that the verifier works."""
    # Libraries may print, but the channel to the parent must carry only replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    verifier = Verifier()
    for answer, truth, expected in SELF_TEST:
        result = verifier.verify(answer, truth)
        if result != expected:
            raise SystemExit(
                f"math-verify returns {result!r} for {answer} and {truth}, expected {expected!r}: broken venv"
            )
    _limit_memory(memory_limit_mb * 2**20)
    replies.write(json.dumps({"result": "ready"}).encode() + b"\n")
    replies.flush()
    # Later output is about hostile text and would only fill the disk.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    _serve(verifier, sys.stdin.buffer, replies, timeout_s)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
