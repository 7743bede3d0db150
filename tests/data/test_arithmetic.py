import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.data.arithmetic import ALPHABET, LEVELS, ArithmeticDataset, num_distinct
from nemo_rl.errors import ConfigError, DataError

DISTINCT = {1: 8_100, 2: 8_100, 3: 1_620_000, 4: 11_520, 5: 8_100}  # as in the module's table


def prompts(dataset):
    return [problem.prompt for problem in dataset]


@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_correct_and_characters_known(level):
    for index, problem in enumerate(ArithmeticDataset("train", 500, [level])):
        assert problem.prompt.endswith("=")
        # Python's arithmetic is the independent reference; the prompt contains only digits and operators.
        assert set(problem.prompt + problem.answer) <= set(ALPHABET)
        assert str(eval(problem.prompt.removesuffix("="))) == problem.answer
        assert problem.metadata == {"level": level}
        assert problem.index == index


@settings(max_examples=30, deadline=None)
@given(
    st.sets(st.sampled_from([1, 2, 4, 5]), min_size=1),
    st.integers(1, 3000),
    st.integers(1, 500),
    st.integers(-5, 2**40),
    st.integers(-5, 2**40),
)
def test_splits_are_disjoint(levels, num_train, num_validation, seed, other_seed):
    train = prompts(ArithmeticDataset("train", num_train, sorted(levels), seed))
    validation = prompts(ArithmeticDataset("validation", num_validation, sorted(levels), other_seed))
    assert len(set(train)) == len(train) == num_train
    assert len(set(validation)) == len(validation) == num_validation
    assert not set(train) & set(validation)


@pytest.mark.parametrize("level", LEVELS)
def test_splits_cover_all_problems(level):
    train, validation = num_distinct("train", [level]), num_distinct("validation", [level])
    assert train + validation == DISTINCT[level]
    assert 0.10 < validation / DISTINCT[level] < 0.15


def test_exchanged_operands_stay_in_one_split():
    train = set(prompts(ArithmeticDataset("train", num_distinct("train", [1]), [1])))
    for prompt in train:
        a, b = prompt.removesuffix("=").split("+")
        assert f"{b}+{a}=" in train


def test_problems_depend_only_on_the_seed():
    assert prompts(ArithmeticDataset("train", 100, [1, 2], 7)) == prompts(ArithmeticDataset("train", 100, [2, 1], 7))
    assert prompts(ArithmeticDataset("train", 100, [1], 7)) != prompts(ArithmeticDataset("train", 100, [1], 8))


def test_levels_share_problems_evenly():
    levels = [problem.metadata["level"] for problem in ArithmeticDataset("train", 300, [1, 3, 5])]
    assert {level: levels.count(level) for level in set(levels)} == {1: 100, 3: 100, 5: 100}
    num_small, num_large = num_distinct("train", [1]), num_distinct("train", [4])
    levels = [p.metadata["level"] for p in ArithmeticDataset("train", num_small + num_large, [1, 4])]
    assert (levels.count(1), levels.count(4)) == (num_small, num_large)


def test_too_many_problems_are_rejected():
    available = num_distinct("validation", [1])
    assert len(ArithmeticDataset("validation", available, [1])) == available
    with pytest.raises(DataError, match=rf"{available + 1} arithmetic validation .* only {available}.*num_validation"):
        ArithmeticDataset("validation", available + 1, [1])


@pytest.mark.parametrize("levels", [[0], [1, 6], []])
def test_unknown_levels(levels):
    with pytest.raises(ConfigError, match=r"(unknown levels \[[06]\]|no levels given); known: \[1, 2, 3, 4, 5\]"):
        ArithmeticDataset("train", 10, levels)


def test_problems_never_change():
    """Reported results refer to these problems."""
    assert prompts(ArithmeticDataset("validation", 4, [1], seed=0)) == ["14+50=", "54+44=", "70+32=", "39+68="]
    with pytest.raises(IndexError):
        ArithmeticDataset("train", 4)[4]
