"""Ranks laid out on named axes, such as data, pipeline and tensor parallelism. Needs numpy only."""

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
    """An n-dimensional integer array of ranks whose axes have names. Immutable and hashable.

    Example, eight ranks as 2 (data) x 4 (tensor)::

        sharding = NamedSharding(np.arange(8).reshape(2, 4), ["data_parallel", "tensor_parallel"])
        sharding.get_ranks(data_parallel=1)                      # NamedSharding([4, 5, 6, 7], ["tensor_parallel"])
        sharding.get_ranks(data_parallel=1, tensor_parallel=2)   # 6
        sharding.get_worker_coords(6)                            # {"data_parallel": 1, "tensor_parallel": 2}

    Args:
        layout: nested sequences or an array; every element is a rank: a whole number, not negative, given once.
        names: one distinct, non-empty name per axis of `layout`.

    Raises:
        ValueError: ragged layout, wrong number of names, repeated names, or ranks that are not whole, are negative or
            are given twice.
    """

    def __init__(self, layout: Layout, names: Sequence[str]) -> None:
        self._layout = _checked_layout(layout)
        self._names = _checked_names(names, self._layout.ndim)
        self._position_of_rank = {int(rank): position for position, rank in enumerate(self._layout.flat)}
        if len(self._position_of_rank) != self._layout.size:
            values, counts = np.unique(self._layout, return_counts=True)
            raise ValueError(f"Duplicate ranks in layout: {values[counts > 1].tolist()}. Give every rank once.")

    @property
    def layout(self) -> NDArray[np.int64]:
        """The array of ranks (read-only)."""
        return self._layout

    @property
    def names(self) -> list[str]:
        """The axes' names, outermost first."""
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
        """Position of the axis `name`. Raises `ValueError` for an unknown one."""
        try:
            return self._names.index(name)
        except ValueError:
            hint = did_you_mean(str(name), self._names)
            raise ValueError(f"Unknown axis {name!r}; the axes are {list(self._names)}.{hint}") from None

    def get_axis_size(self, name: str) -> int:
        """Size of the axis `name`. Raises `ValueError` for an unknown one."""
        return self._layout.shape[self.get_axis_index(name)]

    def get_ranks(self, **axis_index: int) -> int | NamedSharding:
        """The ranks at the given axis indices: an int when every axis is given, else a sharding over the other axes.

        Raises:
            ValueError: unknown axis, or an index that is not an integer.
            IndexError: an index outside `0 <= index < size of its axis`.
        """
        selection = self._selection(axis_index)
        picked = self._layout[selection]
        if len(axis_index) == self.ndim:
            return int(picked)
        return NamedSharding(picked, [name for name in self._names if name not in axis_index])

    def get_ranks_by_coord(self, **coords: int) -> list[int]:
        """All ranks whose coordinates match `coords`, in layout order. Errors as in `get_ranks`."""
        return [int(rank) for rank in self._layout[self._selection(coords)].flat]

    def get_worker_coords(self, rank: int) -> dict[str, int]:
        """Axis name -> index of `rank`. Raises `ValueError` when the layout does not hold it."""
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
            # Numpy would count a negative index from the end; a negative rank coordinate is a bug of the caller.
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
    whole = array.size == 0 or np.issubdtype(array.dtype, np.integer)
    if not whole and np.issubdtype(array.dtype, np.floating):
        # Whole numbers that came through a float array (as from YAML or a division) are still ranks; NaN is not.
        whole = bool(np.isfinite(array).all() and (array == np.floor(array)).all())
    if not whole:
        raise ValueError(f"A layout must hold integer ranks only, got dtype {array.dtype}: {array.tolist()!r}")
    if array.size and array.min() < 0:
        raise ValueError(f"A layout must hold ranks >= 0, got {int(array.min())}.")
    ranks = array.astype(np.int64)
    ranks.setflags(write=False)
    return ranks


def _checked_names(names: Sequence[str], ndim: int) -> tuple[str, ...]:
    if isinstance(names, str):
        raise ValueError(f"Give the axis names as a list, not as the text {names!r}.")
    checked = tuple(names)
    if len(checked) != ndim:
        raise ValueError(f"The layout has {ndim} axes but {len(checked)} names were given: {list(checked)}.")
    if not all(isinstance(name, str) and name for name in checked):
        raise ValueError(f"Axis names must be texts that are not empty, got {list(checked)}.")
    if len(set(checked)) != len(checked):
        raise ValueError(f"Axis names must differ from each other, got {list(checked)}.")
    return checked
