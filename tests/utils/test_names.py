"""`nemo_rl.utils.names`: suggestions and abbreviated lists."""

import pytest

from nemo_rl.utils.names import abbreviated, did_you_mean, nearest_names, suggest_or_list


def test_nearest_names_are_ordered_by_similarity() -> None:
    assert nearest_names("seeds", ["shed", "seed", "other"], 2) == ["seed", "shed"]
    assert nearest_names("seeds", ["other"]) == []


def test_did_you_mean_is_empty_without_a_similar_name() -> None:
    assert did_you_mean("nccll", ["nccl", "local"]) == " Did you mean 'nccl'?"
    assert did_you_mean("zzz", ["nccl", "local"]) == ""


def test_suggest_or_list_falls_back_to_all_names() -> None:
    assert suggest_or_list("anser", ["prompt", "answer"]) == "; did you mean 'answer'?"
    assert suggest_or_list("zzz", ["prompt", "answer"]) == "; there are: answer, prompt"
    assert suggest_or_list("zzz", []) == "; there are: none"


@pytest.mark.parametrize(
    ("names", "text"),
    [([], "none"), (["a", "b", "c"], "a, b, c"), (["a", "b", "c", "d", "e"], "a, b, c and 2 more")],
)
def test_abbreviated_counts_the_names_left_out(names: list[str], text: str) -> None:
    assert abbreviated(names) == text
