"""Generates a sample of noisy mathematical problems, of any size, to test data curation.

The seed decides the whole sample. It has the faults of real collections: exact copies, slightly reworded copies, wrong
answers, answers that are not mathematics, wrongly decoded text, lines in another encoding, and truncated lines.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SampleKind = Literal["word_problems", "arithmetic"]
Record = dict[str, str | None]

_NAMES = ("Zoë", "Jürgen", "Amélie", "Søren", "Lucía", "Anna", "Tom", "Mireille", "Paweł", "Ben")
_THINGS = ("apples", "crêpes", "marbles", "tickets", "stamps", "books", "seeds", "pencils")
_OPENINGS = (
    "On a rainy Tuesday in the small town of {town}, {name} is thinking about numbers.",
    "{name}, who lives near the market in {town}, keeps careful records of everything.",
    "While the café in {town} is still closed, {name} does some arithmetic by hand.",
    "At the school fair in {town}, {name} runs the stall next to the entrance.",
)
_TOWNS = ("Zürich", "Málaga", "Aarhus", "Łódź", "Bremen", "Tours", "Gdańsk", "Ghent")


@dataclass
class Sample:
    """A sample that was written to a file.

    Attributes:
        path: JSON lines with the keys `problem`, `answer` and `solution`.
        counts: Kind of line, such as "good", "exact duplicate" or "wrong answer" -> number of lines.
    """

    path: Path
    counts: Counter[str] = field(default_factory=Counter)


def write_messy_math(path: Path, num_lines: int, seed: int = 0, kind: SampleKind = "word_problems") -> Sample:
    """Write a sample of `num_lines` lines. The file appears only when it is complete.

    Args:
        path: Where to write the file.
        num_lines: Number of lines.
        seed: Decides every line.
        kind: "word_problems", in words and LaTeX; "arithmetic", such as `37+48=`, which the embedded model can learn.
    """
    random_source = random.Random(seed)
    sample = Sample(path)
    good: list[Record] = []
    seen: set[str] = set()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        for _ in range(num_lines):
            fault = random_source.choices([f for f, _ in _FAULTS], [w for _, w in _FAULTS])[0] if good else "good"
            file.write(_line(fault, _SOURCES[kind], random_source, good, seen) + b"\n")
            sample.counts[fault] += 1
    temporary.replace(path)
    return sample


_FAULTS = (
    ("good", 62),
    ("exact duplicate", 9),
    ("near duplicate", 8),
    ("wrong answer", 5),
    ("unreadable answer", 3),
    ("no answer", 2),
    ("wrongly decoded", 6),
    ("other encoding", 3),
    ("cut off", 2),
)


def _line(fault: str, kind: _Kind, source: random.Random, good: list[Record], seen: set[str]) -> bytes:
    if fault == "exact duplicate":
        return _encoded(source.choice(good))
    if fault == "near duplicate":
        original = source.choice(good)
        return _encoded({**original, "problem": source.choice(kind.changes)(original["problem"] or "")})
    record = _new(kind, source, seen)
    if fault in ("good", "wrongly decoded", "other encoding"):
        good.append(record)
    if fault == "wrongly decoded":
        return _encoded({key: _mojibake(value or "") for key, value in record.items()})
    if fault == "other encoding":
        return json.dumps(record, ensure_ascii=False).encode("cp1252", errors="xmlcharrefreplace")
    if fault == "cut off":
        line = _encoded(record)
        return line[: len(line) * 2 // 3]
    if fault == "wrong answer":
        record["answer"] = f"{record['answer']}7"
    elif fault == "unreadable answer":
        record["answer"] = source.choice(["see the appendix }", "\\frac{{", "left as an exercise {{", "\\left( 3 +"])
    elif fault == "no answer":
        record["answer"] = source.choice([None, "", "   "])
    return _encoded(record)


def _encoded(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


def _mojibake(text: str) -> str:
    """Return UTF-8 text decoded as Latin-1."""
    return text.encode().decode("latin-1")


def _new(kind: _Kind, source: random.Random, seen: set[str]) -> Record:
    while True:
        record = source.choice(kind.makers)(source, len(seen))
        if record["problem"] not in seen:
            seen.add(record["problem"] or "")
            return record


def _opening(source: random.Random) -> tuple[str, str]:
    name = source.choice(_NAMES)
    return name, source.choice(_OPENINGS).format(name=name, town=source.choice(_TOWNS))


def _shopping(source: random.Random, _: int) -> Record:
    name, opening = _opening(source)
    count, price, paid = source.randint(3, 60), source.randint(2, 40), source.randint(1, 50)
    thing = source.choice(_THINGS)
    total, given = count * price, count * price + paid
    return {
        "problem": f"{opening} {name} buys {count} {thing} at {price} euros each and pays with {given} euros. "
        f"How many euros of change does {name} get back?",
        "answer": str(paid),
        "solution": f"The {thing} cost {count} \\times {price} = {total} euros. The change is {given} - {total} = "
        f"{paid}. \\boxed{{{paid}}}",
    }


def _fractions(source: random.Random, _: int) -> Record:
    name, opening = _opening(source)
    a, b, c, d = (source.randint(1, 9), source.randint(2, 12), source.randint(1, 9), source.randint(2, 12))
    numerator, denominator = a * d + c * b, b * d
    return {
        "problem": f"{opening} {name} adds $\\frac{{{a}}}{{{b}}}$ and $\\frac{{{c}}}{{{d}}}$. What is the sum?",
        "answer": f"\\frac{{{numerator}}}{{{denominator}}}",
        "solution": f"A common denominator is {b} \\times {d} = {denominator}. The sum is \\frac{{{a * d}}}"
        f"{{{denominator}}} + \\frac{{{c * b}}}{{{denominator}}}. \\boxed{{\\frac{{{numerator}}}{{{denominator}}}}}",
    }


def _quadratic(source: random.Random, _: int) -> Record:
    name, opening = _opening(source)
    p, q = source.sample(range(-15, 16), 2)
    b, c = -(p + q), p * q
    low, high = min(p, q), max(p, q)
    return {
        "problem": f"{opening} {name} writes $x^2 {b:+d}x {c:+d} = 0$ on a napkin. Find both solutions as a set.",
        "answer": f"\\{{{low}, {high}\\}}",
        "solution": f"The numbers {p} and {q} have the sum {p + q} and the product {c}. So the equation is "
        f"(x - ({p}))(x - ({q})) = 0. Hence x = {low} or x = {high}. \\boxed{{\\{{{low}, {high}\\}}}}",
    }


def _roots(source: random.Random, _: int) -> Record:
    name, opening = _opening(source)
    k, n = source.randint(2, 30), source.choice([2, 3, 5, 6, 7, 10, 11, 13])
    return {
        "problem": f"{opening} {name} simplifies $\\sqrt{{{k * k * n}}}$ completely. What is the result?",
        "answer": f"{k}\\sqrt{{{n}}}",
        "solution": f"Since {k * k * n} = {k}^2 \\times {n}, the root is {k}\\sqrt{{{n}}}. \\boxed{{{k}\\sqrt{{{n}}}}}",
    }


def _journey(source: random.Random, _: int) -> Record:
    name, opening = _opening(source)
    speed, hours, rest = source.randint(4, 95), source.randint(2, 14), source.randint(3, 120)
    distance = speed * hours
    return {
        "problem": f"{opening} {name} travels for {hours} hours at {speed} kilometres per hour, rests for {rest} "
        f"minutes, and then travels the same way back. How many kilometres does {name} travel in all?",
        "answer": str(2 * distance),
        "solution": f"One way is {speed} \\times {hours} = {distance} kilometres. The rest of {rest} minutes adds no "
        f"distance. Both ways are 2 \\times {distance} = {2 * distance}. \\boxed{{{2 * distance}}}",
    }


def _arithmetic(source: random.Random, num_seen: int) -> Record:
    largest = 99 if num_seen < 10_000 else 9_999  # two digits while there are enough such problems
    a, b, sign = source.randint(10, largest), source.randint(10, largest), source.choice("++-*")
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return {
        "problem": f"{a}{sign}{b}=",
        "answer": str(result),
        "solution": f"{a}{sign}{b}={result}. \\boxed{{{result}}}",
    }


@dataclass(frozen=True)
class _Kind:
    """One kind of problems.

    Attributes:
        makers: Functions that make a problem, from a random source and the number of problems so far.
        changes: Functions that reword a problem.
    """

    makers: Sequence[Callable[[random.Random, int], Record]]
    changes: Sequence[Callable[[str], str]]


_SOURCES: dict[SampleKind, _Kind] = {
    "word_problems": _Kind(
        (_shopping, _fractions, _quadratic, _roots, _journey),
        (
            lambda text: text.replace(",", " ,").upper(),
            lambda text: f"Please read carefully. {text}",
            lambda text: text.replace(". ", ".  ") + " Show your work.",
        ),
    ),
    "arithmetic": _Kind(
        (_arithmetic,), (lambda text: " ".join(re.split(r"([-+*=])", text)).strip(), lambda text: f"{text} ?")
    ),
}
