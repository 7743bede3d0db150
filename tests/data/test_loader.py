import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.data.arithmetic import ArithmeticDataset
from nemo_rl.data.config import DataConfig
from nemo_rl.data.datasets import load_datasets
from nemo_rl.data.loader import MixedLoader, PromptLoader, validation_batch
from nemo_rl.data.processing import TokenizedProblems
from nemo_rl.errors import CheckpointError, DataError

_PROBLEMS: dict[int, TokenizedProblems] = {}


@pytest.fixture(scope="module")
def problems(tokenizer):
    def make(size, seed=0):
        if (size, seed) not in _PROBLEMS:
            dataset = ArithmeticDataset("train", size, seed=seed)
            _PROBLEMS[size, seed] = TokenizedProblems(dataset, tokenizer, DataConfig())
        return _PROBLEMS[size, seed]

    return make


def take(loader, sizes):
    return [loader.next_batch(size) for size in sizes]


def indices(batches):
    return [index for batch in batches for index in batch["problem_index"].tolist()]


def test_every_epoch_has_every_problem_in_a_new_order(problems):
    loader = PromptLoader(problems(10), 0, seed=1)
    order = indices(take(loader, [3] * 10))  # batches span the ends of epochs
    epochs = [order[start : start + 10] for start in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert loader.epoch == 3
    assert indices(take(PromptLoader(problems(10), 0, seed=1), [30])) == order
    assert indices(take(PromptLoader(problems(10), 0, seed=2), [30])) != order


def test_without_shuffling(problems):
    loader = PromptLoader(problems(3), 0, shuffle=False)
    assert indices(take(loader, [2, 2, 2])) == [0, 1, 2, 0, 1, 2]


def test_batches_contain_prompts_and_answers(problems, tokenizer):
    batch = PromptLoader(problems(20), tokenizer.pad_token_id, padding_side="left").next_batch(4)
    assert set(batch) == {"input_ids", "input_lengths", "problem_index", "prompt", "question", "answer", "metadata"}
    for prompt, answer in zip(batch["prompt"], batch["answer"]):
        assert str(eval(prompt.removesuffix("="))) == answer


def test_number_of_epochs(problems):
    loader = PromptLoader(problems(5), 0, num_epochs=2)
    assert [batch.size for batch in take(loader, [4, 4])] == [4, 4]
    assert loader.next_batch(3) is None  # two problems remain
    assert loader.next_batch(2).size == 2
    assert loader.next_batch(1) is None
    assert loader.epoch == 2
    with pytest.raises(DataError, match="5 problems in 2 epochs do not make one batch of 11"):
        PromptLoader(problems(5), 0, num_epochs=2).next_batch(11)
    with pytest.raises(ValueError, match="at least 1"):
        loader.next_batch(0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_resume_gives_the_same_sequence(problems, data):
    size = data.draw(st.sampled_from([1, 7, 20]))
    seed = data.draw(st.integers(0, 2**40))
    shuffle = data.draw(st.booleans())
    before = data.draw(st.lists(st.integers(1, 9), max_size=6))
    after = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    undisturbed = PromptLoader(problems(size), 0, seed=seed, shuffle=shuffle)
    take(undisturbed, before)
    state = json.loads(json.dumps(undisturbed.state_dict()))  # as in a checkpoint
    expected = take(undisturbed, after)
    resumed = PromptLoader(problems(size), 0, seed=seed, shuffle=shuffle)
    resumed.load_state_dict(state)
    for one, other in zip(take(resumed, after), expected):
        assert one["input_ids"].equal(other["input_ids"])
        assert one["prompt"] == other["prompt"]
    assert resumed.state_dict() == undisturbed.state_dict()


def test_state_of_other_data_is_rejected(problems):
    state = PromptLoader(problems(10), 0, seed=1).state_dict()
    for other, name in [
        (PromptLoader(problems(10), 0, seed=2), "seed was 1 and is now 2"),
        (PromptLoader(problems(10), 0, seed=1, shuffle=False), "shuffle was True"),
        (PromptLoader(problems(11), 0, seed=1), "num_problems was 10 and is now 11"),
        (PromptLoader(problems(10, seed=5), 0, seed=1), "digest was"),
    ]:
        with pytest.raises(CheckpointError, match=name):
            other.load_state_dict(state)
    loader = PromptLoader(problems(10), 0, seed=1)
    with pytest.raises(CheckpointError, match=r"lacks \['digest', 'epoch'"):
        loader.load_state_dict({"position": 1})
    with pytest.raises(CheckpointError, match="impossible: epoch 0, position 10"):
        loader.load_state_dict(state | {"position": 10})


def test_validation_batch(problems):
    assert validation_batch(problems(10), 0)["problem_index"].tolist() == list(range(10))
    assert validation_batch(problems(10), 0, max_num_problems=4)["problem_index"].tolist() == [0, 1, 2, 3]
    assert validation_batch(problems(10), 0, max_num_problems=40).size == 10


def mixed(problems, weights, **options) -> MixedLoader:
    loaders = {
        name: PromptLoader(problems(size), 0, seed=number, **options)
        for number, (name, size) in enumerate({"a": 10, "b": 7, "c": 5}.items())
    }
    return MixedLoader(loaders, lambda batch: weights, 0)


@settings(max_examples=50)
@given(
    st.tuples(*[st.integers(0, 9)] * 3).filter(any),
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
)
def test_mixture_has_the_share_of_each_environment(problems, weights, sizes):
    loader = mixed(problems, dict(zip("abc", weights)))
    chosen = [name for batch in take(loader, sizes) for name in batch["environment"]]
    assert len(chosen) == sum(sizes)
    for name, weight in zip("abc", weights):
        for count in range(1, len(chosen) + 1):
            assert abs(chosen[:count].count(name) - count * weight / sum(weights)) < 2
        assert weight or name not in chosen


def test_mixture_resumes_exactly(problems):
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    loader = mixed(problems, weights)
    take(loader, [4, 5])
    state = json.loads(json.dumps(loader.state_dict()))
    expected = take(loader, [6, 3])
    resumed = mixed(problems, weights)
    resumed.load_state_dict(state)
    for one, other in zip(take(resumed, [6, 3]), expected):
        assert one["environment"] == other["environment"]
        assert one["prompt"] == other["prompt"]
    del state["loaders"]["c"]
    with pytest.raises(CheckpointError, match=r"\['a', 'b'\], and the job has \['a', 'b', 'c'\]"):
        resumed.load_state_dict(state)


def test_rows_of_a_mixture_belong_to_their_environment(problems):
    loader = mixed(problems, {"a": 1, "b": 1, "c": 0}, shuffle=False)
    batch = loader.next_batch(6)
    assert batch["environment"] == ["a", "b"] * 3
    assert batch["problem_index"].tolist() == [0, 0, 1, 1, 2, 2]
    for row, name in enumerate(batch["environment"]):
        size = {"a": 10, "b": 7}[name]
        assert batch["prompt"][row] == problems(size)[batch["problem_index"][row]].text


def test_mixture_ends_with_its_first_environment(problems):
    loader = mixed(problems, {"a": 0, "b": 0, "c": 1}, num_epochs=1)
    assert loader.next_batch(4) is not None
    assert loader.next_batch(4) is None


def test_seeds_of_training_and_validation_differ(tokenizer):
    train, validation = load_datasets(DataConfig(train={"kind": "seeds", "max_num_problems": 3}))
    assert [problem.metadata["seed"] for problem in train] == [0, 1, 2]
    assert len(validation) == 256
    assert validation[0].metadata["seed"] == 2**31
    batch = PromptLoader(TokenizedProblems(train, tokenizer, DataConfig()), 0).next_batch(3)
    assert batch["question"] == [""] * 3
