"""The library's stages, in pipelines with the venvs that they need."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nemo_rl.data.sample_math import write_messy_math
from nemo_rl.errors import PipelineDefinitionError, StageStartError
from nemo_rl.pipelines import DocumentBatch, Pipeline
from nemo_rl.pipelines.stages.dedup import ExactDuplicateFilter, NearDuplicates
from nemo_rl.pipelines.stages.grading import SolutionEffortGrade
from nemo_rl.pipelines.stages.language import LanguageFilter
from nemo_rl.pipelines.stages.math_answers import MathAnswerCheck
from nemo_rl.pipelines.stages.text import TextFilter, TextRepair, TokenCounter


def batch(*rows: Mapping[str, Any], name: str = "b") -> DocumentBatch:
    return DocumentBatch(name, "d", pd.DataFrame(list(rows)))


def texts(tasks: Sequence[Any], column: str = "text") -> list[Any]:
    return [value for task in tasks for value in task.to_pandas()[column]]


class Drops:
    """Collects what a stage reports."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def dropped(self, reason: str, count: int, examples: Sequence[Mapping[str, Any]]) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count

    def set_aside(self, records: Sequence[Mapping[str, Any]]) -> None:
        raise AssertionError("nothing to set aside here")


@pytest.mark.usefixtures("ray_local")
def test_text_repair() -> None:
    rows = [
        {"text": "schÃ¶n &amp; gut  "},
        {"text": "e\u0301te\u0301\x00"},
        {"text": "“5′”\r\n  two   words"},
        {"text": None},
    ]
    repaired = Pipeline("p", stages=[TextRepair(["text"])]).run(initial_tasks=[batch(*rows)])
    assert texts(repaired)[:3] == ["schön & gut", "été", "“5′”\ntwo words"]
    assert pd.isna(texts(repaired)[3])
    assert repaired[0]._metadata["num_repaired"] == 3


def test_text_filter_reports_dropped_rows() -> None:
    stage = TextFilter("text", min_chars=3, max_chars=20, min_alphanumeric=0.5, max_repeated_lines=0.3)
    stage._reporter = drops = Drops()
    rows = ["ab", "fine text", "x" * 21, "--- ... +++", "a1\na1\nb1", None, "also fine"]
    remaining = stage.process(batch(*({"text": text} for text in rows)))
    assert remaining is not None
    assert texts([remaining]) == ["fine text", "also fine"]
    assert drops.counts == {
        "shorter than 3 characters": 1,
        "longer than 20 characters": 1,
        "less than 50% letters and digits": 1,
        "more than 30% repeated lines": 1,
        "no text": 1,
    }
    assert stage.process(batch({"text": ""})) is None
    with pytest.raises(PipelineDefinitionError, match="leave nothing"):
        TextFilter("text", min_chars=5, max_chars=4)


@pytest.mark.usefixtures("ray_local")
def test_exact_duplicates() -> None:
    given = [
        batch({"text": "One  two", "n": 1}, {"text": "three", "n": 2}, name="a"),
        batch({"text": "one two", "n": 3}, {"text": "One  two", "n": 4}, {"text": "four", "n": 5}, name="b"),
        batch({"text": "three", "n": 6}, name="c"),
    ]
    exact = Pipeline("p", stages=[ExactDuplicateFilter(["text"])]).run(initial_tasks=given)
    assert texts(exact, "n") == [1, 2, 3, 5]
    loose = Pipeline("p", stages=[ExactDuplicateFilter(["text"], ignore_case_and_spaces=True)])
    assert texts(loose.run(initial_tasks=given), "n") == [1, 2, 5]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_near_duplicates() -> None:
    words = "a train leaves the station at noon and travels north for {} hours while another one waits in the shed"
    given = [
        batch({"text": words.format(3), "n": 1}, {"text": "something else entirely, with other words", "n": 2}),
        batch({"text": "Please: " + words.format(3).upper(), "n": 3}, {"text": words.format(4), "n": 4}),
        batch({"text": "a b", "n": 5}, {"text": None, "n": 6}),
    ]
    stage = NearDuplicates("text", threshold=0.6)
    near = Pipeline("p", stages=[stage]).run(initial_tasks=given)
    assert texts(near, "n") == [1, 2, 5, 6]
    assert "_minhash" not in near[0].columns
    wordless = [{"text": text, "n": number} for number, text in enumerate(["€ - £", "?!", None, "\n", "?!", "a b"])]
    remaining = Pipeline("p", stages=[stage]).run(initial_tasks=[batch(*wordless)])
    assert texts(remaining, "n") == list(range(6)), "texts without words have no near duplicates"
    careful = NearDuplicates("text", threshold=0.6, protect_numbers=True)
    assert texts(Pipeline("p", stages=[careful]).run(initial_tasks=given), "n") == [1, 2, 4, 5, 6]
    formulas = ["37+48=", "37 + 48 =", "37*48=", "37-48=", r"37 \times 48=", r"37 \div 48=", r"37 \DIV 48"]
    rows = [{"text": text, "n": number} for number, text in enumerate(formulas)]
    assert texts(Pipeline("p", stages=[careful]).run(initial_tasks=[batch(*rows)]), "n") == [0, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_math_answers_with_two_sympy_versions() -> None:
    rows = [
        {"answer": "4", "solution": r"so \boxed{4}"},
        {"answer": r"\frac{1}{2}", "solution": r"so \boxed{0.5}"},
        {"answer": r"2\sqrt{3}", "solution": r"so \boxed{\sqrt{12}}"},
        {"answer": "5", "solution": r"so \boxed{6}"},
        {"answer": r"x+1", "solution": r"so \boxed{x+2}"},
        {"answer": r"\frac{{", "solution": r"so \boxed{1}"},
        {"answer": " ", "solution": r"so \boxed{1}"},
        {"answer": "7", "solution": "no box"},
    ]
    stages = [
        MathAnswerCheck(solution="solution", output=f"by_{i}").with_(
            name=f"check {version}", runtime_env={"uv": [f"sympy=={version}"]}
        )
        for i, version in enumerate(("1.13.3", "1.12.1"))
    ]
    (task,) = Pipeline("p", stages=stages).run(initial_tasks=[batch(*rows)])
    assert texts([task], "answer") == ["4", r"\frac{1}{2}", r"2\sqrt{3}"]
    assert set(texts([task], "by_0")) == {"sympy 1.13.3"}
    assert set(texts([task], "by_1")) == {"sympy 1.12.1"}


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow  # loads a model
def test_language_filter(tmp_path: Path) -> None:
    rows = [
        {"text": "How much change does Anna get back when she pays with a note of ten?", "n": 1},
        {"text": "Wie viel Geld bekommt Anna zurück, wenn sie mit einem Schein bezahlt?", "n": 2},
        {"text": "Combien de pommes est-ce que Pierre peut acheter avec sa monnaie ?", "n": 3},
        {"text": r"\frac{1}{2} + \sqrt{3}", "n": 4},
        {"text": None, "n": 5},
    ]
    (detected,) = Pipeline("p", stages=[LanguageFilter("text")]).run(initial_tasks=[batch(*rows)])
    assert texts([detected], "language") == ["en", "de", "fr", "und", "und"]
    confidence = texts([detected], "language_confidence")
    assert min(confidence[:3]) > 0.5 > max(confidence[3:]) >= 0
    english = LanguageFilter("text", keep=["en", "fr"], output="lang")
    (remaining,) = Pipeline("p", stages=[english]).run(initial_tasks=[batch(*rows)], run_dir=tmp_path)
    assert texts([remaining], "n") == [1, 3, 4, 5]
    (counts,) = json.loads((tmp_path / "stages.json").read_text())
    assert {reason: dropped["count"] for reason, dropped in counts["dropped"].items()} == {"in de": 1}
    strict = LanguageFilter("text", keep=["de"], keep_undetermined=False)
    assert texts(Pipeline("p", stages=[strict]).run(initial_tasks=[batch(*rows)]), "n") == [2]
    with pytest.raises(StageStartError, match=r"\['xx'\]: not supported by the model. Known: .*\ben\b"):
        Pipeline("p", stages=[LanguageFilter("text", keep=["en", "xx"])]).run(initial_tasks=[batch(*rows)])


def test_invalid_language_filter_options() -> None:
    for keep in ("en", []):
        with pytest.raises(PipelineDefinitionError, match="expected codes such as"):
            LanguageFilter("text", keep=keep)
    with pytest.raises(PipelineDefinitionError, match="min_confidence=1"):
        LanguageFilter("text", min_confidence=1)


def test_solution_effort_grade() -> None:
    stage = SolutionEffortGrade(levels=(3, 6))
    rows = ["It is 4.", "2 + 2 = 4. So it is 4.", "First 2 * 3 = 6. Then 6 / 2 = 3. At last 3 + 1 = 4.", None]
    graded = stage.process(batch(*({"solution": text} for text in rows)))
    assert texts([graded], "difficulty") == [1, 2, 3, 1]
    with pytest.raises(PipelineDefinitionError, match="must ascend"):
        SolutionEffortGrade(levels=(3, 3))


def test_token_counter(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    stage = TokenCounter(str(tmp_path))
    stage.setup()
    assert texts([stage.process(batch({"text": "a b a"}, {"text": None}))], "num_tokens") == [3, 0]


def test_messy_sample_depends_on_the_seed(tmp_path: Path) -> None:
    seeds = (("a", 1), ("b", 1), ("c", 2))
    first, again, other = (write_messy_math(tmp_path / name, 300, seed) for name, seed in seeds)
    assert first.path.read_bytes() == again.path.read_bytes() != other.path.read_bytes()
    assert first.counts.total() == 300
    assert len(first.counts) == 9
