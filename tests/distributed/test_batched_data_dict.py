import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.distributed.batched_data_dict import BatchedDataDict, SlicedDataDict
from nemo_rl.distributed.batches.sequence_packing import DynamicBatchingArgs, SequencePackingArgs


def numbered(size: int, width: int = 3) -> BatchedDataDict:
    """Create a batch in which row i of every key contains i."""
    ids = torch.arange(size)
    return BatchedDataDict(
        input_ids=ids[:, None].expand(size, width).clone(),
        score=ids.float(),
        text=[f"row {i}" for i in range(size)],
    )


def rows_of(batch: BatchedDataDict) -> list[int]:
    rows = batch["score"].long().tolist()
    assert batch["text"] == [f"row {i}" for i in rows]
    if batch["input_ids"].shape[1]:
        assert batch["input_ids"][:, 0].tolist() == rows
    return rows


# --- rows and keys


def test_size_is_shared_by_all_keys():
    assert numbered(5).size == 5
    assert BatchedDataDict().size == 0
    with pytest.raises(ValueError, match=r"'a': 2, 'b': 3"):
        _ = BatchedDataDict(a=torch.zeros(2, 4), b=[1, 2, 3]).size
    with pytest.raises(ValueError, match="'a' is a tensor without dimensions"):
        _ = BatchedDataDict(a=torch.tensor(1)).size
    with pytest.raises(ValueError, match="'a' is a str"):
        _ = BatchedDataDict(a="abc").size


def test_slice_returns_views_and_checks_bounds():
    batch = numbered(5)
    part = batch.slice(1, 3)
    assert type(part) is SlicedDataDict
    assert rows_of(part) == [1, 2]
    part["score"][0] = 9.0
    assert batch["score"][1] == 9.0
    for start, end in [(-1, 2), (0, 6), (3, 2)]:
        with pytest.raises(IndexError, match="out of range"):
            batch.slice(start, end)


def test_select_indices():
    batch = numbered(4)
    assert rows_of(batch.select_indices([3, 0, 3])) == [3, 0, 3]
    assert rows_of(batch.select_indices(torch.tensor([2, 1]))) == [2, 1]
    assert rows_of(batch.select_indices(torch.tensor([True, False, False, True]))) == [0, 3]
    assert rows_of(batch.select_indices([])) == []
    with pytest.raises(IndexError, match="Row 4"):
        batch.select_indices([4])
    with pytest.raises(IndexError, match="Row -1"):
        batch.select_indices([-1])
    with pytest.raises(ValueError, match=r"\[4\], got \[2\]"):
        batch.select_indices(torch.tensor([True, False]))


def test_select_keys():
    batch = numbered(2)
    chosen = batch.select_keys("score", "text")
    assert list(chosen) == ["score", "text"]
    assert chosen["score"] is batch["score"]
    with pytest.raises(ValueError, match=r"no keys \['scores'\]"):
        batch.select_keys("scores")


def test_chunk():
    batch = numbered(6)
    assert [rows_of(batch.chunk(rank, 3)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="6 rows cannot be divided evenly by 4 chunks"):
        batch.chunk(0, 4)
    with pytest.raises(IndexError, match="Chunk 3"):
        batch.chunk(3, 3)


def test_chunks_are_views():
    batch = numbered(6)
    batch.chunk(1, 3)["score"][0] = 9.0
    assert batch["score"][2] == 9.0
    batch.select_indices(range(2, 4))["score"][0] = 5.0
    assert batch["score"][2] == 9.0


def test_get_batch():
    assert rows_of(numbered(6).get_batch(1, 2)) == [2, 3]
    with pytest.raises(ValueError, match="needs batch_size"):
        numbered(6).get_batch(0)
    with pytest.raises(IndexError):
        numbered(6).get_batch(3, 2)


def test_get_dict_and_copy():
    batch = numbered(2)
    assert type(batch.get_dict()) is dict
    twin = batch.copy()
    assert type(twin) is BatchedDataDict
    twin["score"] = torch.ones(2)
    assert batch["score"].tolist() == [0.0, 1.0]
    assert copy.copy(batch)["input_ids"] is batch["input_ids"]


def test_to_moves_in_place():
    batch = numbered(2)
    assert batch.to("meta") is batch
    assert batch["input_ids"].device.type == "meta"
    assert batch["text"] == ["row 0", "row 1"]


# --- joining


def test_from_batches_concatenates_and_pads():
    a = {"ids": torch.tensor([[1, 2]]), "mask": torch.tensor([[True, True]]), "text": ["a"]}
    b = {"ids": torch.tensor([[3, 4, 5], [6, 7, 8]]), "mask": torch.ones(2, 3, dtype=torch.bool), "text": ["b", "c"]}
    batch = BatchedDataDict.from_batches([a, b], pad_value_dict={"ids": 99})
    assert batch["ids"].tolist() == [[1, 2, 99], [3, 4, 5], [6, 7, 8]]
    assert batch["mask"].tolist() == [[True, True, False], [True] * 3, [True] * 3]
    assert batch["text"] == ["a", "b", "c"]
    assert type(batch) is BatchedDataDict


def test_from_batches_pads_every_dimension_but_the_first():
    parts = [{"x": torch.ones(1, 2, 1)}, {"x": torch.ones(1, 1, 3)}]
    joined = BatchedDataDict.from_batches(parts, {"x": -1})["x"]
    assert joined.tolist() == [[[1, -1, -1], [1, -1, -1]], [[1, 1, 1], [-1, -1, -1]]]


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ([], "at least one"),
        ([{"a": [1]}, {"b": [1]}], r"different keys.*\['a', 'b'\]"),
        ([{"a": torch.zeros(2, 3)}, {"a": torch.zeros(2)}], r"'a'.*dimensions.*\[2, 3\], \[2\]"),
        ([{"a": torch.zeros(2)}, {"a": [0.0, 1.0]}], r"'a' is a tensor.*list.*\[2\], 'list of 2'"),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.long)}], "'a' has different dtypes"),
        ([{"a": torch.zeros(2), "b": [1]}], r"'a': 2, 'b': 1"),
    ],
)
def test_from_batches_rejects_incompatible_values(parts, match):
    with pytest.raises(ValueError, match=match):
        BatchedDataDict.from_batches(parts)


def test_repeat_interleave_copies_list_items():
    batch = BatchedDataDict(x=torch.tensor([1, 2]), chat=[[{"role": "user"}], [{"role": "system"}]])
    repeated = batch.repeat_interleave(2)
    assert repeated["x"].tolist() == [1, 1, 2, 2]
    repeated["chat"][0].append("more")
    assert repeated["chat"][1] == [{"role": "user"}]
    assert batch["chat"][0] == [{"role": "user"}]
    assert batch.repeat_interleave(0).size == 0
    with pytest.raises(ValueError, match="-1"):
        batch.repeat_interleave(-1)


def test_truncate_tensors_keeps_narrow_tensors_and_lists():
    batch = numbered(2, width=5)
    batch.truncate_tensors(dim=1, truncated_len=2)
    assert batch["input_ids"].shape == (2, 2)
    assert batch["score"].shape == (2,)
    batch.truncate_tensors(dim=1, truncated_len=9)
    assert batch["input_ids"].shape == (2, 2)
    with pytest.raises(ValueError, match="dim=0"):
        batch.truncate_tensors(dim=0, truncated_len=2)


def test_reorder_data_moves_rows():
    batch = numbered(3)
    batch.reorder_data([2, 0, 1])  # row 0 goes to position 2, row 1 to 0, row 2 to 1
    assert rows_of(batch) == [1, 2, 0]
    for order in ([0, 1], [0, 1, 1], [0, 1, 3]):
        with pytest.raises(ValueError, match="permutation of the 3 rows"):
            batch.reorder_data(order)


# --- pickling


def test_view_is_pickled_without_its_storage():
    batch = BatchedDataDict(x=torch.zeros(1_000_000), text=["t"] * 1_000_000)
    assert len(pickle.dumps(batch.slice(10, 20))) < 2_000


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickle_keeps_values_dtypes_and_plan(protocol):
    batch = BatchedDataDict(
        bf16=torch.randn(4, 3).to(torch.bfloat16),
        strided=torch.arange(12).view(3, 4).T,
        flags=torch.tensor([True, False, True, False]),
        empty=torch.zeros(4, 0),
        input_ids=torch.ones(4, 2, dtype=torch.long),
        input_lengths=torch.tensor([1, 2, 2, 1]),
        text=["a", "b", "c", "d"],
    )
    shards, _ = batch.shard_by_batch_size(1, dynamic_batching_args={"max_tokens_per_microbatch": 4})
    twin = pickle.loads(pickle.dumps(shards[0], protocol=protocol))
    assert type(twin) is SlicedDataDict
    assert twin.microbatch_plan == shards[0].microbatch_plan
    for key, value in shards[0].items():
        if isinstance(value, torch.Tensor):
            assert twin[key].dtype == value.dtype
            assert torch.equal(twin[key], value)
        else:
            assert twin[key] == value


def test_unpickled_tensors_are_writable_copies():
    """Ray returns read-only shared memory, which an in-place operation on a batch must not change."""
    buffers: list[pickle.PickleBuffer] = []
    data = io.BytesIO()
    pickle.Pickler(data, protocol=5, buffer_callback=buffers.append).dump(BatchedDataDict(x=torch.ones(4)))
    frozen = [bytes(buffer) for buffer in buffers]
    assert sum(map(len, frozen)) == 16
    twin = pickle.loads(data.getvalue(), buffers=frozen)
    twin["x"].mul_(2)
    assert pickle.loads(data.getvalue(), buffers=frozen)["x"].tolist() == [1.0] * 4


def test_deepcopy_is_independent():
    batch = numbered(2)
    twin = copy.deepcopy(batch)
    twin["score"][0] = 7.0
    assert batch["score"][0] == 0.0


# --- sharding


def test_shards_get_a_part_of_each_global_batch():
    shards = numbered(8).shard_by_batch_size(2, batch_size=4)
    assert [rows_of(shard) for shard in shards] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert rows_of(shards[1].get_batch(1, 2)) == [6, 7]
    assert all(type(shard) is SlicedDataDict for shard in shards)


def test_one_global_batch_is_sharded_without_a_copy():
    batch = numbered(8)
    shards = batch.shard_by_batch_size(4)
    assert [rows_of(shard) for shard in shards] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert shards[1]["input_ids"].data_ptr() == batch["input_ids"][2:].data_ptr()


def test_uneven_shards():
    shards = numbered(7).shard_by_batch_size(3, allow_uneven_shards=True)
    assert [rows_of(shard) for shard in shards] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [s.size for s in numbered(2).shard_by_batch_size(3, allow_uneven_shards=True)] == [1, 1, 0]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"shards": 3}, "8 rows per global batch cannot be divided evenly by 3 shards"),
        ({"shards": 2, "batch_size": 3}, "8 rows cannot be divided evenly by 3 rows per global batch"),
        ({"shards": 4, "batch_size": 2}, "2 rows per global batch cannot be divided evenly by 4 shards"),
        ({"shards": 0}, "shards must be at least 1"),
        ({"shards": 2, "batch_size": 0}, "at least 1"),
        ({"shards": 2, "batch_size": 4, "allow_uneven_shards": True}, "excludes"),
        ({"shards": 0, "allow_uneven_shards": True}, "at least 1"),
        (
            {
                "shards": 2,
                "dynamic_batching_args": {"max_tokens_per_microbatch": 4},
                "sequence_packing_args": {"max_tokens_per_microbatch": 4},
            },
            "not both",
        ),
        ({"shards": 2, "dynamic_batching_args": {"max_tokens": 4}}, r"Unknown.*\['max_tokens'\]"),
        ({"shards": 2, "dynamic_batching_args": {}}, "needs max_tokens_per_microbatch"),
        ({"shards": 2, "sequence_packing_args": {"max_tokens_per_microbatch": 0}}, "positive integer, got 0"),
        (
            {"shards": 2, "sequence_packing_args": {"max_tokens_per_microbatch": 4}},
            r"no key 'input_lengths', only \['input_ids', 'score', 'text'\]",
        ),
    ],
)
def test_invalid_sharding_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        numbered(8).shard_by_batch_size(**kwargs)


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="4 rows per global batch of a shard cannot be divided evenly by 3 rows per g"):
        numbered(8).shard_by_batch_size(2, rows_per_group=3)
    for kind, tokens in (("dynamic_batching_args", 8), ("sequence_packing_args", 7)):
        with pytest.raises(ValueError, match=f"Group of 2 rows 1 takes {tokens} tokens .*max_tokens_per_microbatch=6"):
            with_lengths([3, 3, 4, 3]).shard_by_batch_size(
                1, rows_per_group=2, **{kind: {"max_tokens_per_microbatch": 6}}
            )


def with_lengths(lengths: list[int], width: int | None = None) -> BatchedDataDict:
    batch = numbered(len(lengths), width if width is not None else max(lengths))
    batch["input_lengths"] = torch.tensor(lengths)
    batch["hidden"] = torch.zeros(len(lengths), 7919)  # not a sequence dimension, so never cut
    return batch


@pytest.mark.parametrize("kind", ["dynamic_batching_args", "sequence_packing_args"])
def test_invalid_lengths(kind):
    with pytest.raises(ValueError, match=r"Row 1 takes 5 tokens.*max_tokens_per_microbatch=4"):
        with_lengths([1, 5]).shard_by_batch_size(1, **{kind: {"max_tokens_per_microbatch": 4}})
    with pytest.raises(ValueError, match=r"'input_lengths'\[1\] is 5.*has 3 tokens per row"):
        with_lengths([1, 5], width=3).shard_by_batch_size(1, **{kind: {"max_tokens_per_microbatch": 9}})
    with pytest.raises(ValueError, match="empty batch"):
        with_lengths([], width=3).shard_by_batch_size(1, **{kind: {"max_tokens_per_microbatch": 9}})


def test_rounding_counts_against_the_bound():
    args = DynamicBatchingArgs(max_tokens_per_microbatch=10, sequence_length_round=4)
    (shard,), _ = with_lengths([1, 5, 2, 4], width=8).shard_by_batch_size(1, dynamic_batching_args=args)
    parts = list(shard.make_microbatch_iterator_with_dynamic_shapes())
    # Padded to 8, 4, 4, 4: the long row alone, then two of width 4, then one.
    assert [part["input_ids"].shape for part in parts] == [(1, 8), (2, 4), (1, 4)]
    assert parts[0]["input_lengths"].tolist() == [5]


@pytest.mark.parametrize(("bound", "rows"), [(10, [1, 1, 1, 1]), (19, [1, 1, 1, 1]), (20, [2, 2]), (40, [4])])
def test_rounded_length_is_at_most_the_width(bound, rows):
    batch = with_lengths([10, 9, 10, 10], width=10)
    args = {"max_tokens_per_microbatch": bound, "sequence_length_round": 8}
    (shard,), _ = batch.shard_by_batch_size(1, dynamic_batching_args=args)
    parts = list(shard.make_microbatch_iterator_with_dynamic_shapes())
    assert [part["input_ids"].shape for part in parts] == [(count, 10) for count in rows]
    assert [mb.length for mb in shard.microbatch_plan.batches[0]] == [10] * len(rows)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.integers(20, 30), st.integers(1, 64), st.data())
def test_dynamic_batches_are_as_full_as_the_bound_allows(lengths, width, multiple, data):
    bound = data.draw(st.integers(width, 4 * width))
    args = DynamicBatchingArgs(max_tokens_per_microbatch=bound, sequence_length_round=multiple)
    (shard,), _ = with_lengths(lengths, width=width).shard_by_batch_size(1, dynamic_batching_args=args)
    parts = list(shard.make_microbatch_iterator_with_dynamic_shapes())
    for index, part in enumerate(parts):
        rows, length = part["input_ids"].shape
        assert rows * length <= bound
        assert length == min(-(-max(*part["input_lengths"].tolist(), 1) // multiple) * multiple, width)
        assert index == len(parts) - 1 or (rows + 1) * length > bound


def test_packing_fills_bins():
    args = SequencePackingArgs(max_tokens_per_microbatch=10)
    (shard,), _ = with_lengths([6, 4, 5, 5, 3, 7]).shard_by_batch_size(1, sequence_packing_args=args)
    bins = [part["input_lengths"].tolist() for part in shard.make_microbatch_iterator_for_packable_sequences()]
    assert sorted(map(sorted, bins)) == [[3, 7], [4, 6], [5, 5]]


def test_iterators_reject_shards_without_their_plan():
    packed, _ = with_lengths([1, 2]).shard_by_batch_size(1, sequence_packing_args={"max_tokens_per_microbatch": 4})
    with pytest.raises(ValueError, match="dynamic_batching_args"):
        packed[0].make_microbatch_iterator_with_dynamic_shapes()
    with pytest.raises(ValueError, match="sequence_packing_args"):
        numbered(2).make_microbatch_iterator_for_packable_sequences()
    with pytest.raises(ValueError, match="micro-batch plan"):
        _ = numbered(2).num_microbatches
    with pytest.raises(ValueError, match="5 rows cannot be divided evenly by 2 rows per micro-batch"):
        numbered(5).make_microbatch_iterator(2)


def test_make_microbatch_iterator():
    assert [rows_of(part) for part in numbered(6).make_microbatch_iterator(2)] == [[0, 1], [2, 3], [4, 5]]


@st.composite
def sharding_cases(draw):
    shards = draw(st.integers(1, 4))
    group = draw(st.integers(1, 3))
    per_shard = group * draw(st.integers(1, 4))
    num_batches = draw(st.integers(1, 3))
    total = shards * per_shard * num_batches
    lengths = draw(st.lists(st.integers(0, 20), min_size=total, max_size=total))
    multiple = draw(st.sampled_from([1, 4, 8]))
    bound = draw(st.integers(24 * group, 80 * group))
    return lengths, shards, shards * per_shard, multiple, bound, group


@settings(max_examples=150, deadline=None)
@given(sharding_cases(), st.sampled_from(["dynamic", "packed"]))
def test_properties_of_planned_shards(case, kind):
    lengths, shards, batch_size, multiple, bound, group = case
    if kind == "dynamic":
        args = {
            "dynamic_batching_args": DynamicBatchingArgs(
                max_tokens_per_microbatch=bound, sequence_length_round=multiple
            )
        }
    else:
        args = {
            "sequence_packing_args": SequencePackingArgs(
                max_tokens_per_microbatch=bound, sequence_length_pad_multiple=multiple
            )
        }
    batch = with_lengths(lengths, width=20)
    parts, order = batch.shard_by_batch_size(shards, batch_size, rows_per_group=group, **args)
    again, order_again = batch.shard_by_batch_size(shards, batch_size, rows_per_group=group, **args)
    assert order == order_again
    assert [part.microbatch_plan for part in parts] == [part.microbatch_plan for part in again]

    # No row is lost or duplicated, and the order can be restored.
    joined = BatchedDataDict.from_batches(parts)
    assert rows_of(joined) == order
    assert sorted(order) == list(range(len(lengths)))
    joined.reorder_data(order)
    assert rows_of(joined) == list(range(len(lengths)))
    assert joined["input_lengths"].tolist() == lengths

    def padded(length: int) -> int:
        return -(-max(length, 1) // multiple) * multiple

    for index in range(len(lengths) // batch_size):
        globals_ = [part.get_batch(index) for part in parts]
        # Each global batch keeps its rows, in the same number of micro-batches on each shard.
        assert sorted(row for part in globals_ for row in rows_of(part)) == list(
            range(index * batch_size, (index + 1) * batch_size)
        )
        assert len({part.num_microbatches for part in globals_}) == 1
        for part in globals_:
            if kind == "dynamic":
                micro = list(part.make_microbatch_iterator_with_dynamic_shapes())
                for mb in micro:
                    longest = max(mb["input_lengths"].tolist())
                    assert mb["input_ids"].shape[1] >= longest
                    assert mb["input_ids"].shape[1] * mb.size <= bound
                    assert mb["hidden"].shape[1] == 7919
            else:
                micro = list(part.make_microbatch_iterator_for_packable_sequences())
                for mb in micro:
                    assert sum(map(padded, mb["input_lengths"].tolist())) <= bound
            assert all(mb.size for mb in micro)
            # The rows of a group are in one micro-batch, in order.
            for rows in map(rows_of, micro):
                assert [row // group for row in rows[::group]] == [row // group for row in rows[group - 1 :: group]]
                assert [row % group for row in rows] == [*range(group)] * (len(rows) // group)
            assert [row for mb in micro for row in rows_of(mb)] == rows_of(part)

    # A shard iterates over all its global batches.
    for part in parts:
        iterator = (
            part.make_microbatch_iterator_with_dynamic_shapes()
            if kind == "dynamic"
            else part.make_microbatch_iterator_for_packable_sequences()
        )
        assert [row for mb in iterator for row in rows_of(mb)] == rows_of(part)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 4), st.integers(1, 3), st.booleans())
def test_plain_shards_contain_all_rows(shards, per_shard, num_batches, uneven):
    if uneven:
        size = shards * per_shard + num_batches
        parts = numbered(size).shard_by_batch_size(shards, allow_uneven_shards=True)
        assert [row for part in parts for row in rows_of(part)] == list(range(size))
        assert max(p.size for p in parts) - min(p.size for p in parts) <= 1
        return
    batch_size = shards * per_shard
    if batch_size == 0:
        return
    parts = numbered(batch_size * num_batches).shard_by_batch_size(shards, batch_size)
    for index in range(num_batches):
        rows = [row for part in parts for row in rows_of(part.get_batch(index, per_shard))]
        assert rows == list(range(index * batch_size, (index + 1) * batch_size))


# --- collectives, with real processes

ALL_GATHER = """
import sys
import torch
import torch.distributed as dist
from nemo_rl.distributed.batched_data_dict import BatchedDataDict

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
local = BatchedDataDict(
    ids=torch.full((rank + 1, rank + 2), rank),
    bf16=torch.full((rank + 1,), 0.5 + rank, dtype=torch.bfloat16),
    flags=torch.tensor([bool(rank)] * (rank + 1)),
    none=torch.zeros(rank + 1, 0),
    text=[f"rank {rank}"] * (rank + 1),
)
if rank == 1:  # a different order of keys must not mix up the tensors
    local = BatchedDataDict(dict(reversed(local.items())))
gathered = local.all_gather(dist.group.WORLD, pad_value_dict={"ids": -1})
assert gathered["ids"].tolist() == [[0, 0, -1], [1, 1, 1], [1, 1, 1]], gathered
assert gathered["bf16"].dtype == torch.bfloat16 and gathered["bf16"].tolist() == [0.5, 1.5, 1.5], gathered
assert gathered["flags"].tolist() == [False, True, True], gathered
assert gathered["none"].shape == (3, 0), gathered
assert gathered["text"] == ["rank 0", "rank 1", "rank 1"], gathered

for bad in (
    BatchedDataDict(a=torch.zeros(2)) if rank else BatchedDataDict(b=torch.zeros(2)),
    BatchedDataDict(a=torch.zeros(2)) if rank else BatchedDataDict(a=[0, 0]),
    BatchedDataDict(a=torch.zeros(2)) if rank else BatchedDataDict(a=torch.zeros(2, 1)),
    BatchedDataDict(a=torch.zeros(2), b=[1]) if rank else BatchedDataDict(a=torch.zeros(2), b=[1, 2]),
):
    try:
        bad.all_gather(dist.group.WORLD)
    except ValueError:
        continue
    raise AssertionError(f"rank {rank} accepted {bad}")
dist.barrier()
dist.destroy_process_group()
"""


def test_all_gather_between_two_processes(tmp_path):
    script = tmp_path / "gather.py"
    script.write_text(ALL_GATHER)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=400)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], outputs


@pytest.mark.parametrize("algorithm", ["modified_first_fit_decreasing", "CONCATENATIVE", None])
def test_packing_accepts_the_keys_of_nemo_rl(algorithm: str | None) -> None:
    batch = BatchedDataDict({"input_ids": torch.ones(4, 10), "input_lengths": torch.tensor([10, 9, 3, 4])})
    args = {
        "max_tokens_per_microbatch": 16,
        "input_key": "input_ids",
        "input_lengths_key": "input_lengths",
        "algorithm": algorithm,
        "sequence_length_pad_multiple": 2,
    }
    shards, _ = batch.shard_by_batch_size(2, sequence_packing_args=args)
    assert sorted(int(length) for shard in shards for length in shard["input_lengths"]) == [3, 4, 9, 10]


def test_unknown_packing_algorithm_is_refused() -> None:
    batch = BatchedDataDict({"input_ids": torch.ones(2, 4), "input_lengths": torch.tensor([4, 4])})
    with pytest.raises(ValueError, match="algorithm is 'best_fit'; expected one of concatenative"):
        batch.shard_by_batch_size(1, sequence_packing_args={"max_tokens_per_microbatch": 8, "algorithm": "best_fit"})
