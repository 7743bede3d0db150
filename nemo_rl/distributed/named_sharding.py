"""Ranks on named axes, such as data, pipeline and tensor parallelism. Needs only numpy."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, SupportsIndex, TypeAlias

import numpy as np

from nemo_rl.utils.names import did_you_mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

Layout: TypeAlias = "int | Sequence[Layout] | NDArray[np.integer]"


class NamedSharding:
    """Arranges ranks in an n-dimensional integer array with named axes. Immutable and hashable.

    Example, eight ranks as 2 (data) x 4 (tensor):

        >>> sharding = NamedSharding(np.arange(8).reshape(2, 4), ["data", "tensor"])
        >>> sharding.shape
        {'data': 2, 'tensor': 4}
        >>> sharding.get_ranks(data=1, tensor=2)
        6
        >>> sharding.get_ranks(data=1)
        NamedSharding(shape={'tensor': 4}, names=['tensor'], layout=[4, 5, 6, 7])
        >>> sharding.get_ranks_by_coord(tensor=0)
        [0, 4]
        >>> sharding.get_worker_coords(6)
        {'data': 1, 'tensor': 2}

    Args:
        layout: nested sequences or an array of ranks: distinct integers >= 0.
        names: one distinct, non-empty name per axis of `layout`.

    Raises:
        ValueError: the layout is ragged, the number of names is wrong, names repeat, or ranks are not integers, are
            negative or repeat.
    """

    def __init__(self, layout: Layout, names: Sequence[str]) -> None:
        self._layout = _checked_layout(layout)
        self._names = _checked_names(names, self._layout.ndim)
        self._position_of_rank = {int(rank): position for position, rank in enumerate(self._layout.flat)}
        if len(self._position_of_rank) != self._layout.size:
            values, counts = np.unique(self._layout, return_counts=True)
            raise ValueError(f"Duplicate ranks in layout: {values[counts > 1].tolist()}. Each rank must occur once.")

    @property
    def layout(self) -> NDArray[np.int64]:
        """The array of ranks (read-only)."""
        return self._layout

    @property
    def names(self) -> list[str]:
        """The names of the axes, outermost first."""
        return list(self._names)

    @property
    def shape(self) -> dict[str, int]:
        """Axis name -> size, outermost first."""
        return dict(zip(self._names, self._layout.shape))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self._layout.ndim

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._layout.size

    def get_axis_index(self, name: str) -> int:
        """Return the position of the axis `name`. Raises `ValueError` for an unknown axis."""
        try:
            return self._names.index(name)
        except ValueError:
            hint = did_you_mean(str(name), self._names)
            raise ValueError(f"Unknown axis {name!r}; the axes are {list(self._names)}.{hint}") from None

    def get_axis_size(self, name: str) -> int:
        """Return the size of the axis `name`. Raises `ValueError` for an unknown axis."""
        return self._layout.shape[self.get_axis_index(name)]

    def get_ranks(self, **axis_index: int) -> int | NamedSharding:
        """Return the ranks at the given axis indices: an int if every axis is given, else a sharding over the others.

        Raises:
            ValueError: an axis is unknown, or an index is not an integer.
            IndexError: an index is outside `0 <= index < size of its axis`.
        """
        selection = self._selection(axis_index)
        selected = self._layout[selection]
        if len(axis_index) == self.ndim:
            return int(selected)
        return NamedSharding(selected, [name for name in self._names if name not in axis_index])

    def get_ranks_by_coord(self, **coords: int) -> list[int]:
        """Return all ranks whose coordinates match `coords`, in layout order. Errors as in `get_ranks`."""
        return [int(rank) for rank in self._layout[self._selection(coords)].flat]

    def get_worker_coords(self, rank: int) -> dict[str, int]:
        """Return axis name -> index of `rank`. Raises `ValueError` if the layout does not contain it."""
        position = self._position_of_rank.get(rank)
        if position is None:
            raise ValueError(f"Rank {rank!r} is not in the layout of {self.size} ranks.")
        return {name: int(i) for name, i in zip(self._names, np.unravel_index(position, self._layout.shape))}

    def _selection(self, coords: dict[str, int]) -> tuple[int | slice, ...]:
        selection: list[int | slice] = [slice(None)] * self.ndim
        for name, value in coords.items():
            axis = self.get_axis_index(name)
            index = _as_index(name, value)
            size = self._layout.shape[axis]
            # Numpy counts a negative index from the end, but a negative coordinate is an error of the caller.
            if not 0 <= index < size:
                raise IndexError(f"Index {index} is out of range for axis {name!r} of size {size}.")
            selection[axis] = index
        return tuple(selection)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NamedSharding):
            return NotImplemented
        return self._names == other._names and np.array_equal(self._layout, other._layout)

    def __hash__(self) -> int:
        return hash((self._names, self._layout.shape, self._layout.tobytes()))

    def __repr__(self) -> str:
        return f"NamedSharding(shape={self.shape}, names={list(self._names)}, layout={self._layout.tolist()})"

    def __reduce__(self) -> tuple[object, ...]:
        return (NamedSharding, (self._layout, self._names))


def _as_index(name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"The index of axis {name!r} must be an integer, not {value!r}.") from None


def _checked_layout(layout: Layout) -> NDArray[np.int64]:
    try:
        array = np.array(layout)
    except ValueError as error:
        raise ValueError(f"A layout must be a full (not ragged) array of ranks: {error}") from None
    is_integer = array.size == 0 or np.issubdtype(array.dtype, np.integer)
    if not is_integer and np.issubdtype(array.dtype, np.floating):
        # Integers in a float array, as from YAML or a division, are still ranks; NaN is not.
        is_integer = bool(np.isfinite(array).all() and (array == np.floor(array)).all())
    if not is_integer:
        raise ValueError(f"A layout must contain only integer ranks, got dtype {array.dtype}: {array.tolist()!r}")
    if array.size and array.min() < 0:
        raise ValueError(f"A layout must contain only ranks >= 0, got {int(array.min())}.")
    ranks = array.astype(np.int64)
    ranks.setflags(write=False)
    return ranks


def _checked_names(names: Sequence[str], ndim: int) -> tuple[str, ...]:
    if isinstance(names, str):
        raise ValueError(f"Give the axis names as a list, not as the string {names!r}.")
    checked = tuple(names)
    if len(checked) != ndim:
        raise ValueError(f"The layout has {ndim} axes but {len(checked)} names were given: {list(checked)}.")
    if not all(isinstance(name, str) and name for name in checked):
        raise ValueError(f"Axis names must be non-empty strings, got {list(checked)}.")
    if len(set(checked)) != len(checked):
        raise ValueError(f"Axis names must be distinct, got {list(checked)}.")
    return checked
