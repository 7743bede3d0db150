import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.distributed.named_sharding import NamedSharding


@pytest.fixture
def sharding():
    # 2 data x 1 pipeline x 4 tensor; the ranks are out of order on purpose
    return NamedSharding([[[3, 2, 1, 0]], [[4, 5, 6, 7]]], ["dp", "pp", "tp"])


def test_properties_and_repr(sharding):
    assert sharding.shape == {"dp": 2, "pp": 1, "tp": 4}
    assert sharding.names == ["dp", "pp", "tp"]
    assert (sharding.ndim, sharding.size) == (3, 8)
    assert sharding.get_axis_index("tp") == 2
    assert sharding.get_axis_size("tp") == 4
    assert "dp" in repr(sharding)
    assert "[3, 2, 1, 0]" in repr(sharding)


def test_get_ranks_returns_an_int_or_a_smaller_sharding(sharding):
    assert sharding.get_ranks(dp=0, pp=0, tp=1) == 2
    assert type(sharding.get_ranks(dp=0, pp=0, tp=1)) is int
    assert sharding.get_ranks(dp=1) == NamedSharding([[4, 5, 6, 7]], ["pp", "tp"])
    assert sharding.get_ranks(tp=0, pp=0) == NamedSharding([3, 4], ["dp"])
    assert sharding.get_ranks() == sharding


def test_get_ranks_by_coord_lists_matching_ranks(sharding):
    assert sharding.get_ranks_by_coord(tp=3) == [0, 7]
    assert sharding.get_ranks_by_coord(dp=0) == [3, 2, 1, 0]
    assert sharding.get_ranks_by_coord(dp=1, pp=0, tp=2) == [6]
    assert sharding.get_ranks_by_coord() == [3, 2, 1, 0, 4, 5, 6, 7]


def test_get_worker_coords(sharding):
    assert sharding.get_worker_coords(1) == {"dp": 0, "pp": 0, "tp": 2}
    with pytest.raises(ValueError, match="Rank 8"):
        sharding.get_worker_coords(8)


@pytest.mark.parametrize(
    ("layout", "names", "match"),
    [
        ([[0, 1], [2, 3]], ["dp"], "2 axes but 1 names"),
        ([0, 1], ["dp", "tp"], "1 axes but 2 names"),
        ([0, 1.5], ["dp"], "integer"),
        ([0.0, float("nan")], ["dp"], "integer"),
        (["a", "b"], ["dp"], "integer"),
        ([True, False], ["dp"], "integer"),
        ([0, 1, 1], ["dp"], r"Duplicate ranks.*\[1\]"),
        ([0, -1], ["dp"], ">= 0"),
        ([[0, 1], [2]], ["dp", "tp"], "ragged"),
        ([[0], [1]], ["dp", "dp"], "distinct"),
        ([0, 1], [""], "empty"),
        ([0, 1], "d", "as a list"),
    ],
)
def test_invalid_layouts_and_names(layout, names, match):
    with pytest.raises(ValueError, match=match):
        NamedSharding(layout, names)


def test_integral_floats_are_ranks():
    assert NamedSharding([0.0, 1.0], ["dp"]) == NamedSharding([0, 1], ["dp"])


@pytest.mark.parametrize("method", ["get_ranks", "get_ranks_by_coord"])
def test_invalid_coordinates(sharding, method):
    call = getattr(sharding, method)
    with pytest.raises(ValueError, match=r"Unknown axis 'dpx'.*Did you mean 'dp'"):
        call(dpx=0)
    with pytest.raises(ValueError, match="must be an integer"):
        call(dp=0.5)
    with pytest.raises(IndexError, match="Index 2 is out of range for axis 'dp' of size 2"):
        call(dp=2)
    with pytest.raises(IndexError, match="Index -1"):
        call(dp=-1)
    with pytest.raises(ValueError, match="Unknown axis"):
        sharding.get_axis_size("zz")
    with pytest.raises(ValueError, match="Unknown axis"):
        sharding.get_axis_index("zz")


def test_equality_hash_and_pickle(sharding):
    same = NamedSharding(np.array(sharding.layout), sharding.names)
    assert same == sharding
    assert hash(same) == hash(sharding)
    assert pickle.loads(pickle.dumps(sharding)) == sharding
    assert NamedSharding([0, 1], ["dp"]) != NamedSharding([0, 1], ["tp"])
    assert NamedSharding([0, 1], ["dp"]) != NamedSharding([1, 0], ["dp"])
    assert NamedSharding([0, 1], ["dp"]) != [0, 1]


def test_layout_is_a_read_only_copy():
    source = np.arange(4)
    sharding = NamedSharding(source, ["dp"])
    source[0] = 9
    assert sharding.layout.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        sharding.layout[0] = 9


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_coordinates_invert_ranks(dims, random):
    ranks = list(range(int(np.prod(dims))))
    random.shuffle(ranks)
    sharding = NamedSharding(np.array(ranks).reshape(dims), [f"axis{i}" for i in range(len(dims))])
    for rank in ranks:
        coords = sharding.get_worker_coords(rank)
        assert sharding.get_ranks(**coords) == rank
        assert sharding.get_ranks_by_coord(**coords) == [rank]


def test_import_loads_neither_torch_nor_ray():
    code = (
        "import sys, nemo_rl.distributed.named_sharding; "
        "print([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
