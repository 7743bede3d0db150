"""The embedded data set: arithmetic problems of graded difficulty, generated from a seed.

====== ================================== ============ =====================================
level  problems                           example      distinct (train + validation)
====== ================================== ============ =====================================
1      sums of two-digit numbers          `37+48=`     8,100
2      differences of two-digit numbers   `37-48=`     8,100
3      sums and differences, three digits `370+481=`   1,620,000
4      two digits +/- a one-digit product `37+4*8=`    11,520
5      products of two-digit numbers      `37*48=`     8,100
====== ================================== ============ =====================================

A hash of the problem itself decides whether it belongs to train or to validation (one in eight): the splits are
disjoint for all sizes, seeds and levels. `a+b` and `b+a` have the same hash, so that no validation problem is in train
with its operands exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from nemo_rl.data.permutation import mix64
from nemo_rl.data.problem import Problem, ProblemDataset, Role
from nemo_rl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from nemo_rl.data.config import DataConfig, DatasetConfig

# Every character that a prompt or an answer can contain. The embedded tokenizer must know all of them.
ALPHABET = "0123456789+-*="
# One in this many problems belongs to validation.
VALIDATION_SHARE = 8

_OPERAND_BASE = 1000
_FAMILY_BASE = _OPERAND_BASE**3
_SPLIT_SEED, _MIX_SEED = 0x5911_7000, 0x313

_ONE_DIGIT, _TWO_DIGITS, _THREE_DIGITS = range(2, 10), range(10, 100), range(100, 1000)


@dataclass(frozen=True)
class _Family:
    """All problems of one form.

    Attributes:
        form: The prompt, with a `{}` for each operand.
        solve: Computes the answer from the operands.
        operands: The values of each operand.
        commutative: The positions of two operands that can be exchanged without changing the problem.
    """

    form: str
    solve: Callable[..., int]
    operands: tuple[range, ...]
    commutative: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        return math.prod(len(values) for values in self.operands)


# A family's position is part of its problems' hashes: append, never insert or reorder.
_FAMILIES: tuple[_Family, ...] = (
    _Family("{}+{}=", lambda a, b: a + b, (_TWO_DIGITS, _TWO_DIGITS), (0, 1)),
    _Family("{}-{}=", lambda a, b: a - b, (_TWO_DIGITS, _TWO_DIGITS)),
    _Family("{}+{}=", lambda a, b: a + b, (_THREE_DIGITS, _THREE_DIGITS), (0, 1)),
    _Family("{}-{}=", lambda a, b: a - b, (_THREE_DIGITS, _THREE_DIGITS)),
    _Family("{}+{}*{}=", lambda a, b, c: a + b * c, (_TWO_DIGITS, _ONE_DIGIT, _ONE_DIGIT), (1, 2)),
    _Family("{}-{}*{}=", lambda a, b, c: a - b * c, (_TWO_DIGITS, _ONE_DIGIT, _ONE_DIGIT), (1, 2)),
    _Family("{}*{}=", lambda a, b: a * b, (_TWO_DIGITS, _TWO_DIGITS), (0, 1)),
)
LEVELS: dict[int, tuple[int, ...]] = {1: (0,), 2: (1,), 3: (2, 3), 4: (4, 5), 5: (6,)}
_LEVEL_OF_FAMILY = {family: level for level, families in LEVELS.items() for family in families}


class ArithmeticDataset(ProblemDataset):
    """Generates distinct problems of one split, divided evenly among the levels as far as each level has enough.

    Example:
        >>> problem = ArithmeticDataset("validation", 4)[0]
        >>> problem.prompt, problem.answer
        ('14+50=', '64')

    Args:
        split: "train" or "validation".
        num_problems: Number of problems.
        levels: Difficulty levels; see the module's table.
        seed: Decides which problems are chosen, and their order; never the split of a problem.

    Raises:
        ConfigError: A level is unknown.
        DataError: The levels have fewer problems in this split.
    """

    def __init__(self, split: Role, num_problems: int, levels: Sequence[int] = (1,), seed: int = 0) -> None:
        unknown = sorted(set(levels) - set(LEVELS))
        if unknown or not levels:
            what = f"unknown levels {unknown}" if unknown else "no levels given"
            raise ConfigError(f"data.arithmetic.levels: {what}; known: {sorted(LEVELS)}")
        self._split = split
        level_keys = [_shuffled(_split_of_level(level, split), seed) for level in sorted(set(levels))]
        counts = _shared_evenly(num_problems, [len(keys) for keys in level_keys])
        if sum(counts) < num_problems:
            raise DataError(
                f"{num_problems} arithmetic {split} problems were requested, but the levels {sorted(set(levels))} have "
                f"only {sum(counts)}. Lower data.arithmetic.num_{split} or add levels from {list(LEVELS)}."
            )
        chosen = np.concatenate([keys[:count] for keys, count in zip(level_keys, counts)])
        self._keys = _shuffled(chosen, seed + _MIX_SEED)

    @classmethod
    def from_config(cls, config: DatasetConfig, data: DataConfig, role: Role) -> Self:
        arithmetic = data.arithmetic
        wanted = arithmetic.num_train if role == "train" else arithmetic.num_validation
        limit = config.max_num_problems or wanted
        return cls(role, min(wanted, limit), arithmetic.levels, arithmetic.seed)

    def __len__(self) -> int:
        return len(self._keys)

    def problem(self, index: int) -> Problem:
        family_index, rest = divmod(int(self._keys[index]), _FAMILY_BASE)
        family = _FAMILIES[family_index]
        operands = []
        for _ in family.operands:
            rest, operand = divmod(rest, _OPERAND_BASE)
            operands.append(operand)
        level = {"level": _LEVEL_OF_FAMILY[family_index]}
        return Problem(family.form.format(*operands), str(family.solve(*operands)), index, level)

    def where(self, index: int) -> str:
        return f"arithmetic {self._split} problem {index}"


def num_distinct(split: Role, levels: Sequence[int]) -> int:
    """Return the number of distinct problems that the levels have in a split."""
    return sum(len(_split_of_level(level, split)) for level in set(levels))


def _split_of_level(level: int, split: Role) -> NDArray[np.uint64]:
    """Return the keys of all problems of a level that belong to a split."""
    keys = []
    for family_index in LEVELS[level]:
        family = _FAMILIES[family_index]
        operands = np.meshgrid(*(np.arange(v.start, v.stop, dtype=np.uint64) for v in family.operands), indexing="ij")
        columns = [column.ravel() for column in operands]
        family_keys = _keys(family_index, columns)
        if family.commutative:
            first, second = family.commutative
            low, high = np.minimum(columns[first], columns[second]), np.maximum(columns[first], columns[second])
            columns[first], columns[second] = low, high
        in_validation = mix64(_keys(family_index, columns), _SPLIT_SEED) % np.uint64(VALIDATION_SHARE) == 0
        keys.append(family_keys[in_validation if split == "validation" else ~in_validation])
    return np.concatenate(keys)


def _keys(family_index: int, columns: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Encode each problem as one number: the family, then the operands, with the first in the lowest digits."""
    keys = np.full_like(columns[0], family_index * _FAMILY_BASE)
    for position, column in enumerate(columns):
        keys += column * np.uint64(_OPERAND_BASE**position)
    return keys


def _shuffled(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    return keys[np.argsort(mix64(keys, seed), kind="stable")]


def _shared_evenly(total: int, capacities: Sequence[int]) -> list[int]:
    """Divide `total` evenly among parts of limited capacity. The sum is smaller than `total` if all parts are full."""
    counts = [0] * len(capacities)
    open_parts = sorted(range(len(capacities)), key=lambda part: (capacities[part], part))
    while open_parts:
        smallest = open_parts.pop(0)
        counts[smallest] = min(total // (len(open_parts) + 1), capacities[smallest])
        total -= counts[smallest]
    return counts
