"""Tests which answers are equal: reported cases, notations, and random values in every notation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.data.config import DataConfig, DatasetConfig
from nemo_rl.data.datasets import open_dataset
from nemo_rl.environments.answers import (
    answer_key_fault,
    check_answer_keys,
    compare_cheaply,
    extract_answer,
    normalise,
    to_latex,
)
from nemo_rl.environments.math_environment import MathEnvironment
from nemo_rl.environments.math_verifier import Verifier
from nemo_rl.errors import DataError

HERE = Path(__file__).parent
CASES = json.loads((HERE / "math_answers.json").read_text(encoding="utf-8"))
NOTATIONS = json.loads((HERE / "notations.json").read_text(encoding="utf-8"))
FORMATS = json.loads((HERE / "formats.json").read_text(encoding="utf-8"))
KEYS = json.loads((HERE / "answer_keys.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole() -> Iterator[MathEnvironment]:
    environment = MathEnvironment({"num_workers": 2, "timeout_s": 20.0, "answer_format": "whole"})
    yield environment
    environment.shutdown()


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return Verifier()


def equal(verifier: Verifier, answer: str, truth: str) -> bool:
    plain, plain_truth = normalise(answer), normalise(truth)
    same = compare_cheaply(plain, plain_truth)
    return verifier.verify(to_latex(plain), to_latex(plain_truth)) == "equal" if same is None else same


@pytest.mark.parametrize("answer_format", ["whole", "boxed", "last_number"])
def test_reported_cases(answer_format: str) -> None:
    cases = [case for case in CASES if case["answer_format"] == answer_format]
    environment = MathEnvironment({"num_workers": 2, "timeout_s": 20.0, "answer_format": answer_format})
    try:
        result = environment.step([c["completion"] for c in cases], [{"ground_truth": c["truth"]} for c in cases])
    finally:
        environment.shutdown()
    assert cases
    assert [c for c, reward in zip(cases, result.rewards, strict=True) if reward != c["reward"]] == []


def test_notations(whole: MathEnvironment) -> None:
    result = whole.step([answer for answer, _, _ in NOTATIONS], [{"ground_truth": truth} for _, truth, _ in NOTATIONS])
    wrong = [pair for pair, reward in zip(NOTATIONS, result.rewards, strict=True) if reward != pair[2]]
    assert wrong == []


@pytest.mark.parametrize("answer_format", ["last_number", "boxed", "answer_tag", "hash"])
def test_answers_in_completions(answer_format: str) -> None:
    cases = [case[1:] for case in FORMATS if case[0] == answer_format]
    environment = MathEnvironment({"num_workers": 2, "timeout_s": 20.0, "answer_format": answer_format})
    try:
        result = environment.step([c for c, _, _ in cases], [{"ground_truth": truth} for _, truth, _ in cases])
    finally:
        environment.shutdown()
    assert cases
    assert [case for case, reward in zip(cases, result.rewards, strict=True) if reward != case[2]] == []


@pytest.mark.parametrize(
    "key", [*KEYS, "no solution", "Alice and Bob", r"\{", "1:2:3", r"0.\overline{3}", "2024-01-05"]
)
def test_well_formed_keys_stop_no_run(whole: MathEnvironment, key: str) -> None:
    if key == r"\{":
        assert answer_key_fault(key) is None
    result = whole.step([key, "x_{17}"], [{"ground_truth": key}] * 2)
    assert result.rewards.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        (r"\frac{1}{", "braces"),
        ("5}", "braces"),
        ("???", "no letter"),
        ("NaN", "not a number"),
        ("5" * 2001, "2000"),
        ("9^{9^{9^9}}", "a number of more than 1,000,000 digits"),
    ],
)
def test_broken_keys_are_reported_with_their_line(tmp_path: Path, key: str, fault: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"problem": "?", "answer": answer}) + "\n" for answer in ("5", "true", key)))
    dataset = open_dataset(DatasetConfig(path=str(path)), DataConfig(), "train")
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{fault}"):
        check_answer_keys(dataset, 2000)


@pytest.mark.parametrize(
    "key",
    [
        "9^9^9^9", "9^(9^(9^9))", "9**9**9**9", "9^{9^{9}}", "10^{10^{10}}", "2^{10000000}", "(10!)!", "2^{2024!}",
        r"\frac{1}{9^{9^{9^9}}}", r"\sqrt{9^{9^{9^9}}}", "10⁹⁹⁹⁹⁹⁹⁹⁹⁹", "(2^{100})!", "5000000!",
    ],
)  # fmt: skip
def test_numbers_that_nobody_can_compute_are_broken_keys(key: str) -> None:
    assert answer_key_fault(key) == "it contains a number of more than 1,000,000 digits"


@pytest.mark.parametrize(
    "key",
    [
        "2^{1000000}", "5000!", "10^{100}", "2^{2^{2^{2}}}", "1^{1^{1^{9}}}", "x^{y^{z}}", "x^{10^{10}}", "10^{-10}",
        r"\sqrt{2}^{2}", "2^{64}-1", "n!", "((((9))))", "9 \\neq 9",
    ],
)  # fmt: skip
def test_large_numbers_are_keys(key: str) -> None:
    assert answer_key_fault(key) is None


def test_slow_truth_stops_no_run() -> None:
    """math-verify needs many seconds for this root."""
    slow = r"\sqrt{10^{5000}+1}"
    environment = MathEnvironment({"num_workers": 1, "timeout_s": 1.0, "answer_format": "whole"})
    try:
        result = environment.step([slow, "5+x", "5"], [{"ground_truth": slow}] * 3)
    finally:
        environment.shutdown()
    assert result.rewards.tolist() == [1, 0, 0]
    assert result.status == ["ok", "timeout", "timeout"]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"\fbox{5}", "5"),
        (r"\framebox{5}", "5"),
        (r"\\boxed{5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    ],
)
def test_relatives_of_boxed(completion: str, answer: str) -> None:
    assert extract_answer(completion, "boxed") == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("It is 50%.", "50%"),
        ("It is 2 1/2 cups", "2 1/2"),
        ("It is 2½.", r"2\frac{1}{2}"),
        (r"so $-\frac{3}{4}$.", r"-\frac{3}{4}"),
        ("3 × 10⁸ m/s", r"3 \times  10^{8}"),
        ("the ratio 3:4.", "3:4"),
        ("1.000.000,5", "1.000.000,5"),
        ("It is 0,5.", "0,5"),
        ("So 2^10.", "2^10"),
        ("-$5", "-$5"),
        ("on 5/6/2024", "2024"),
        ("1 000 000", "1 000 000"),
        ("٣", "3"),
    ],
)
def test_last_number_is_read_in_full(completion: str, answer: str) -> None:
    assert extract_answer(completion, "last_number") == answer


@pytest.mark.parametrize(
    "part", ["²", "½", "√", "5 a ", "{", "\\text{", "**a ", "{\\bf 7}", "sqrt(", "<b ", "1,000", "7 \\times 10^"]
)
def test_normalisation_takes_linear_time(part: str) -> None:
    # A quadratic rule would run for minutes, and reach the suite's time-out.
    text = part * (100_000 // len(part))
    for hostile in (text, f"5 {text}!"):
        plain = normalise(hostile)
        assert compare_cheaply(plain, "5") in (None, False)
        to_latex(plain)
        answer_key_fault(hostile)


def _grouped(separator: str) -> Callable[[int], str]:
    return lambda n: f"{n:,}".replace(",", separator)


def _in_digits(zero: str) -> Callable[[int], str]:
    return lambda n: "".join(chr(ord(zero) + int(c)) if c.isdigit() else c for c in str(n))


DECORATIONS = [
    "{}", " {}\n", "{}.", "${}$", "$${}$$", r"\({}\)", r"\[{}\]", "**{}**", "*{}*", "`{}`", "<b>{}</b>", "+{}",
    "= {}", "<span class='a'>{}</span>", r"\boldsymbol{{{}}}", r"\mathbf{{{}}}", r"\textbf{{{}}}", r"\mathrm{{{}}}",
    r"\text{{{}}}", r"\textcolor{{blue}}{{{}}}", r"\color{{red}}{{{}}}", r"{{\bf {}}}", r"{{\color{{red}} {}}}",
    r"\boxed{{{}}}", "{{{}}}", r"\displaystyle {}", "{}\\\\", r"{}\quad", "\u200b{}\u200b", "\u00a0{}\u2009",
    "{} units", "{} eggs", "{} cm", "{} cm^2", r"{} \text{{ cm}}^2", r"{}\,\mathrm{{kg}}", "${}", r"\${}", "€{}",
    "{} €", "{} USD", "{} dollars", "The answer is {}.",
]  # fmt: skip
INTEGER_FORMS = [
    str, lambda n: f"{n}.0", lambda n: f"{n}.", _grouped(","), _grouped(" "), _grouped("\u202f"), _grouped("'"),
    _grouped("_"), _grouped("{,}"), _grouped("\\,"), _grouped("٬"), _in_digits("０"), _in_digits("٠"), _in_digits("०"),
    lambda n: f"{n}/1", lambda n: f"\\frac{{{2 * n}}}{{2}}", lambda n: f"{n}e0",
]  # fmt: skip


@given(st.integers(0, 10**12), st.sampled_from(INTEGER_FORMS), st.sampled_from(DECORATIONS), st.booleans())
@settings(max_examples=600, deadline=None)
def test_renderings_of_an_integer(n: int, form: Callable[[int], str], decoration: str, negative: bool) -> None:
    text = form(n)
    if negative and n and not decoration.startswith(("+", "$", r"\$", "€")):
        text, n = f"\u2212{text}", -n
    answer = normalise(decoration.format(text))
    assert compare_cheaply(answer, normalise(str(n))) is True
    assert compare_cheaply(answer, normalise(str(n + 1))) is False
    assert compare_cheaply(answer, normalise(str(n * 1000 + 7))) is False


RATIO_FORMS: list[Callable[[Fraction], str]] = [
    lambda q: f"{q.numerator}/{q.denominator}",
    lambda q: f"{q.numerator} / {q.denominator}",
    lambda q: f"{q.numerator}\u2044{q.denominator}",
    lambda q: f"\\frac{{{q.numerator}}}{{{q.denominator}}}",
    lambda q: f"\\dfrac{{{3 * q.numerator}}}{{{3 * q.denominator}}}",
    lambda q: (
        f"-\\tfrac{{{-q.numerator}}}{{{q.denominator}}}" if q < 0 else f"\\tfrac{{{q.numerator}}}{{{q.denominator}}}"
    ),
    lambda q: _mixed(q, "{} {}/{}"),
    lambda q: _mixed(q, r"{}\frac{{{}}}{{{}}}"),
    lambda q: f"{float(q):.12g}",
]


def _mixed(q: Fraction, form: str) -> str:
    whole, rest = divmod(abs(q.numerator), q.denominator)
    return ("-" if q < 0 else "") + form.format(whole, rest, q.denominator)


@given(st.fractions(-1000, 1000, max_denominator=999), st.sampled_from(RATIO_FORMS), st.sampled_from(RATIO_FORMS[:8]))
@settings(max_examples=600, deadline=None)
def test_renderings_of_a_ratio(
    q: Fraction, form: Callable[[Fraction], str], truth_form: Callable[[Fraction], str]
) -> None:
    truth = normalise(truth_form(q))
    assert compare_cheaply(normalise(form(q)), truth) is True
    for other in (q + Fraction(1, 999), -q or 1, 1 / q if q else 1):
        if q != other:
            assert compare_cheaply(normalise(form(Fraction(other))), truth) is False


@given(st.integers(10**6, 10**9 - 1), st.integers(-30, 30), st.integers(2, 9))
@settings(max_examples=300, deadline=None)
def test_tolerance_is_relative(mantissa: int, exponent: int, factor: int) -> None:
    truth = f"{mantissa}.5e{exponent}"
    assert compare_cheaply(f"{mantissa}.4e{exponent}", truth) is True
    assert compare_cheaply(f"{mantissa + mantissa // 10**5}.5e{exponent}", truth) is False
    assert compare_cheaply(f"{mantissa}.5e{exponent + factor}", truth) is False
    assert compare_cheaply(f"-{mantissa}.5e{exponent}", truth) is False


@given(st.integers(1, 99), st.sampled_from([2, 3, 5, 6, 7, 10]), st.integers(-120, 120))
@settings(max_examples=25, deadline=None)
def test_roots_of_all_sizes(verifier: Verifier, k: int, n: int, exponent: int) -> None:
    truth = f"{k}\\sqrt{{{n}}} \\cdot 10^{{{exponent}}}"
    value = k * n**0.5
    for same in (
        f"\\sqrt{{{k * k * n}}} \\cdot 10^{{{exponent}}}",
        f"{k}*sqrt({n})*10^({exponent})",
        f"{value:.9f}e{exponent}",
    ):
        assert equal(verifier, same, truth), same
    for other in (
        f"{k + 1}\\sqrt{{{n}}} \\cdot 10^{{{exponent}}}",
        f"-{k}\\sqrt{{{n}}} \\cdot 10^{{{exponent}}}",
        f"{k}\\sqrt{{{n}}} \\cdot 10^{{{exponent - 1}}}",
        f"{value * (1 + 1e-4):.9f}e{exponent}",
        f"{k}\\sqrt{{{n}}} \\cdot 10^{{{exponent}}} + 10^{{{exponent - 40}}}",
        "0",
    ):
        assert not equal(verifier, other, truth), other


@given(st.lists(st.fractions(-50, 50, max_denominator=9), min_size=2, max_size=4, unique=True), st.integers(-40, 5))
@settings(max_examples=10, deadline=None)
def test_collections_are_compared_by_element(verifier: Verifier, values: list[Fraction], exponent: int) -> None:
    def text(numbers: list[Fraction], form: str) -> str:
        return form.format(
            ",".join(f"\\frac{{{q.numerator}}}{{{q.denominator}}} \\cdot 10^{{{exponent}}}" for q in numbers)
        )

    changed = [values[0] + Fraction(1, 10), *values[1:]]
    for form in (r"\{{{}\}}", "({})" if len(values) > 2 else "[{}]", r"\begin{{pmatrix}}{}\end{{pmatrix}}"):
        if form.startswith("[") and values[0] >= values[1]:
            continue
        truth = text(values, form).replace(",", "&" if "matrix" in form else ", ")
        other = text(changed, form).replace(",", "&" if "matrix" in form else ",")
        assert equal(verifier, truth.replace(", ", ","), truth)
        assert not equal(verifier, other, truth) or changed[0] in values[1:]
    assert equal(verifier, text(values[::-1], r"\{{{}\}}"), text(values, r"\{{{}\}}"))


def test_huge_exponent_is_not_written_out(verifier: Verifier) -> None:
    # Written out, this number would have 811,199,999 digits: the verify process would run until its time limit.
    assert verifier.verify("1E811199999", "21") == "unparseable"
    assert verifier.verify(r"\frac{1}{3.5e-811199999}", "21") == "unparseable"
    assert verifier.verify("1E4", "10000") == "equal"
