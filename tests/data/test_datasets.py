import gzip
import json
import random
import re
import shlex
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.data.arithmetic import ArithmeticDataset
from nemo_rl.data.config import DataConfig, DatasetConfig
from nemo_rl.data.datasets import DATASETS, load_datasets, open_dataset
from nemo_rl.data.problem import Problem, ProblemDataset, problem_from_record
from nemo_rl.errors import ConfigError, DataError
from nemo_rl.utils.config import load_config

RECORDS = [{"problem": f"{i}+{i}=?", "answer": str(2 * i), "source": f"book {i}"} for i in range(20)]
PROBLEMS = [Problem(r["problem"], r["answer"], i, {"source": r["source"]}) for i, r in enumerate(RECORDS)]
CHAT = [{"role": "user", "content": "1+1?"}]


def opened(path, **options) -> ProblemDataset:
    return open_dataset(DatasetConfig(path=str(path), **options), DataConfig(), "train")


def write_lines(path, lines):
    content = "".join(f"{line}\n" for line in lines).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(content)
    return path


def write_jsonl(path, records=RECORDS):
    return write_lines(path, [json.dumps(record) for record in records])


def write_parquet(path, records=RECORDS):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def write(path, records=RECORDS):
    return write_parquet(path, records) if path.suffix == ".parquet" else write_jsonl(path, records)


# --- files of every kind give the same problems


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_file_kind_gives_the_same_problems(tmp_path, name):
    dataset = opened(write(tmp_path / name))
    assert len(dataset) == 20
    assert list(dataset) == [
        Problem(r["problem"], r["answer"], i, {"source": r["source"]}) for i, r in enumerate(RECORDS)
    ]
    order = list(range(20))
    random.Random(0).shuffle(order)
    assert [dataset[i].answer for i in order] == [str(2 * i) for i in order]
    assert dataset[-1].index == 19
    assert [problem.index for problem in dataset[5:8]] == [5, 6, 7]
    with pytest.raises(IndexError):
        dataset[20]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_keys_limit_numbers_and_chat_prompts(tmp_path, name):
    records = [{"q": CHAT, "a": 42}, {"q": CHAT, "a": 7}, {"q": CHAT, "a": 8}]
    dataset = opened(write(tmp_path / name, records), prompt_key="q", answer_key="a", max_num_problems=2)
    assert list(dataset) == [Problem(CHAT, "42", 0), Problem(CHAT, "7", 1)]


def test_jsonl_skips_empty_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ["", json.dumps(RECORDS[0]), "   ", json.dumps(RECORDS[1]) + "\r"]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    dataset = opened(path)
    assert [problem.answer for problem in dataset] == ["0", "2"]
    assert dataset.where(1) == f"{path}:4"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(RECORDS[3]).encode())
    assert [problem.answer for problem in opened(path)] == ["6"]


def test_jsonl_stops_at_the_limit(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [json.dumps(RECORDS[0]), "broken"])
    assert len(opened(path, max_num_problems=1)) == 1


def test_answer_pattern_finds_answers_in_solutions(tmp_path):
    solutions = ["4+4 is 8.\n#### 8", "6*12=<<6*12=72>>72\n#### 72 ", "#### -1,000"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "?", "answer": text} for text in solutions])
    assert [p.answer for p in opened(path, answer_pattern="#### (.+)")] == ["8", "72", "-1,000"]
    assert [p.answer for p in opened(path)] == solutions


# --- invalid data


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"problem": "1+1", "answer": ', "not a JSON object on one line"),
        ("[1, 2]", "expected a JSON object.* got a list"),
        ('{"problem": "1+1", "answer": ' + "9" * 5000 + "}", "not a JSON object on one line"),
        ("[" * 100_000, "nested too deeply"),
        ('{"problm": "1+1", "answer": "2"}', "no key 'problem' .*did you mean 'problm'"),
        ('{"problem": "1+1", "response": "2"}', r"no key 'answer' .*there are: problem, response"),
        ('{"problem": " ", "answer": "2"}', "'problem' is an empty prompt"),
        ('{"problem": 3, "answer": "2"}', "'problem' must be text or a list of chat messages, got int 3"),
        ('{"problem": [], "answer": "2"}', "'problem' must be text or a list of chat messages"),
        ('{"problem": [{"role": "user"}], "answer": "2"}', "role and content, got dict"),
        ('{"problem": "1+1", "answer": null}', "'answer' must be text or a number, got NoneType"),
        ('{"problem": "1+1", "answer": true}', "'answer' must be text or a number, got bool True"),
        ('{"problem": "1+1", "answer": ""}', "'answer' is an empty answer"),
        ('{"problem": "1+1", "answer": NaN}', "'answer' must be a finite number, got float nan"),
        ('{"problem": "1+1", "answer": -Infinity}', "'answer' must be a finite number, got float -inf"),
        ('{"problem": "1+1", "answer": 1e400}', "'answer' must be a finite number, got float inf"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_invalid_line_is_named(tmp_path, line, match, suffix):
    path = write_lines(tmp_path / f"a.jsonl{suffix}", [json.dumps(RECORDS[0]), "", line, json.dumps(RECORDS[1])])
    with pytest.raises(DataError, match=match) as caught:
        opened(path)
    assert str(caught.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    ("solution", "match"),
    [("It is 72.", "is not found in"), ("####  ", "matches an empty answer in"), (72, "is not found in str '72'")],
)
def test_pattern_without_a_match_is_an_error(tmp_path, solution, match):
    records = [{"problem": "?", "answer": "#### 1"}, {"problem": "?", "answer": solution}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(DataError, match=match) as caught:
        opened(path, answer_pattern="#### ?(.*)")
    assert str(caught.value).startswith(f"{path}:2: 'answer': the pattern '#### ?(.*)' (data.*.answer_pattern) ")


@pytest.mark.parametrize(
    ("pattern", "match"), [("#### (", "is not a regular expression: missing \\)"), ("#### .+", "has no group")]
)
def test_invalid_pattern_is_rejected(pattern, match):
    with pytest.raises(ConfigError, match=rf"data\.train\.answer_pattern.*{match}"):
        load_config(MasterConfig, None, [f"data.train.answer_pattern='{pattern}'"])


def test_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"problem": "caf\xe9", "answer": "2"}\n')
    with pytest.raises(DataError, match="a.jsonl:1: not UTF-8"):
        opened(path)


def test_file_that_changes_during_a_run_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    dataset = opened(path)
    path.write_text("{}\n")
    with pytest.raises(DataError, match="a.jsonl:20"):
        dataset[19]


def test_invalid_row_is_named(tmp_path):
    rows = [{"problem": "1", "answer": "1"}, {"problem": "2", "answer": None}]
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match="a.parquet row 1: 'answer' must be"):
        opened(path)
    with pytest.raises(DataError, match=r"no column 'answr' .*did you mean 'answer'"):
        opened(path, answer_key="answr")


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), Decimal("NaN")])
def test_answer_that_is_not_finite_is_named(tmp_path, answer):
    if isinstance(answer, Decimal):
        with pytest.raises(DataError, match=r"row 1: 'answer' must be a finite number, got Decimal"):
            problem_from_record({"problem": "?", "answer": answer}, 1, DatasetConfig(), "row 1")
        return
    path = write_parquet(tmp_path / "a.parquet", [{"problem": "1", "answer": 1.0}, {"problem": "2", "answer": answer}])
    with pytest.raises(DataError, match=r"a.parquet row 1: 'answer' must be a finite number, got float"):
        opened(path)


def test_decimal_answers_are_numbers(tmp_path):
    rows = [{"problem": "1", "answer": Decimal("1.50")}, {"problem": "2", "answer": Decimal("1E+3")}]
    assert [problem.answer for problem in opened(write_parquet(tmp_path / "a.parquet", rows))] == ["1.50", "1000.00"]
    assert problem_from_record({**rows[1]}, 0, DatasetConfig(), "row").answer == "1000"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_empty_missing_and_damaged_files(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(DataError, match="does not exist$"):
        opened(path)
    (tmp_path / f"b{name}").touch()
    with pytest.raises(DataError, match=f"does not exist; did you mean 'b{name}'"):
        opened(path)
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"problem": ["1"], "answer": ["1"]}).slice(0, 0), path)
    else:
        write_lines(path, ["", " "])
    with pytest.raises(DataError, match=r"data\.train: .* contains no problems"):
        opened(path)
    path.write_bytes(write_jsonl(tmp_path / f"complete.{name}").read_bytes()[:-9] if "parquet" not in name else b"no")
    with pytest.raises(DataError, match=r"cannot be read|not a JSON object"):
        opened(path)


def test_directory_is_not_a_file(tmp_path):
    with pytest.raises(DataError, match="is a directory"):
        opened(tmp_path, kind="jsonl")
    with pytest.raises(ConfigError, match="needs a path"):
        open_dataset(DatasetConfig(kind="parquet"), DataConfig(), "train")


# --- Hugging Face data sets, from local directories


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def saved(tmp_path, hf_cache):
    import datasets

    dataset = datasets.Dataset.from_list(RECORDS)
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=dataset, test=dataset.select([3])).save_to_disk(str(tmp_path / "two"))
    return tmp_path


def test_saved_data_set(saved):
    dataset = opened(saved / "one")
    assert list(dataset) == [
        Problem(r["problem"], r["answer"], i, {"source": r["source"]}) for i, r in enumerate(RECORDS)
    ]
    assert len(opened(saved / "one", max_num_problems=3)) == 3
    with pytest.raises(DataError, match=r"one: no column 'question' .*there are"):
        opened(saved / "one", prompt_key="question")


def test_splits(saved):
    assert opened(saved / "two", split="test")[0].answer == "6"
    with pytest.raises(DataError, match=r"several splits; set data\.\*\.split to one of \['train', 'test'\]"):
        opened(saved / "two")
    with pytest.raises(DataError, match="no split 'valid'"):
        opened(saved / "two", split="valid")


def test_directory_of_data_files(tmp_path, hf_cache):
    directory = tmp_path / "files"
    directory.mkdir()
    write_jsonl(directory / "train.jsonl")
    write_jsonl(directory / "test.jsonl", RECORDS[:3])
    assert len(opened(directory, split="train")) == 20
    assert len(opened(directory, split="train[:10%]")) == 2
    with pytest.raises(DataError, match=r"several splits"):
        opened(directory)
    with pytest.raises(DataError, match=r"cannot be loaded: .*valid"):
        opened(directory, split="valid")


def test_missing_data_set(tmp_path, hf_cache):
    with pytest.raises(DataError, match="'no-such-owner/no-such-data' cannot be loaded: "):
        opened("no-such-owner/no-such-data")


# --- the registry of kinds


class Squares(ProblemDataset):
    """A user's kind of data set."""

    def __init__(self, size):
        self._size = size

    @classmethod
    def from_config(cls, config, data, role):
        return cls(config.max_num_problems or 9)

    def __len__(self):
        return self._size

    def problem(self, index):
        return Problem(f"{index} squared", str(index**2), index)

    def where(self, index):
        return f"square {index}"


def test_custom_kind(monkeypatch):
    monkeypatch.setitem(DATASETS, "squares", Squares)
    for kind in ("squares", f"{__name__}:Squares"):
        dataset = open_dataset(DatasetConfig(kind=kind, max_num_problems=4), DataConfig(), "train")
        assert [problem.answer for problem in dataset] == ["0", "1", "4", "9"]


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("jsnl", "unknown kind 'jsnl'; did you mean 'jsonl'"),
        ("no_such_module:Thing", "cannot be imported"),
        ("json:NoSuchClass", "cannot be imported"),
        ("json:JSONDecoder", "not a subclass"),
    ],
)
def test_unknown_kinds(kind, match):
    with pytest.raises(ConfigError, match=match):
        open_dataset(DatasetConfig(kind=kind), DataConfig(), "train")


def test_default_is_the_generator_with_its_validation_split(tmp_path):
    train, validation = load_datasets(DataConfig(arithmetic={"num_train": 50, "num_validation": 20}))
    assert type(train) is type(validation) is ArithmeticDataset
    assert (len(train), len(validation)) == (50, 20)
    assert not {p.prompt for p in train} & {p.prompt for p in validation}

    path = str(write_jsonl(tmp_path / "a.jsonl"))
    train, validation = load_datasets(DataConfig(train={"path": path}))
    assert (len(train), validation) == (20, None)
    train, validation = load_datasets(
        DataConfig(train={"path": path}, validation={"path": path, "max_num_problems": 5})
    )
    assert (len(train), len(validation)) == (20, 5)
    with pytest.raises(DataError, match=r"data\.validation"):
        load_datasets(DataConfig(validation={"path": str(write_lines(tmp_path / "e.jsonl", []))}))


def test_import_is_light():
    code = (
        "import sys, nemo_rl.data.loader, nemo_rl.data.datasets, nemo_rl.data.processing; "
        "print([n for n in ('datasets', 'transformers', 'pyarrow', 'ray', 'pandas') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_documented_commands_have_valid_keys():
    commands = re.findall(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL)
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "))
        overrides = [word for word in words if word.startswith("data.")]
        assert overrides
        load_config(MasterConfig, None, overrides)
    assert len(commands) >= 5


# --- nulls of columnar formats, and text that cannot be encoded


TOOL_CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "args": {"x": 1}}], "name": "calculator"}
UNEVEN = [
    {"problem": CHAT, "answer": "2"},
    {"problem": [*CHAT, TOOL_CALL, {"role": "user", "content": ""}], "answer": "3", "source": "b"},
    {"problem": [{"role": "user", "content": "x", "tool_calls": [{"id": "b"}]}], "answer": "4", "extra": {"k": 1}},
    {"problem": CHAT, "answer": "5", "extra": {"list": [1, 2], "deep": {"a": 0, "b": False, "c": ""}}},
]


@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
def test_null_of_a_columnar_format_is_absent(tmp_path, kind):
    # Both libraries take the columns from the first row.
    rows = [{**dict.fromkeys(key for record in UNEVEN for key in record), **record} for record in UNEVEN]
    if kind == "parquet":
        columnar = opened(write_parquet(tmp_path / "a.parquet", rows))
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
        columnar = opened(tmp_path / "saved")
    assert list(columnar) == list(opened(write_jsonl(tmp_path / "a.jsonl", UNEVEN)))


def test_required_null_of_a_columnar_format_is_refused(tmp_path):
    records = [*RECORDS[:2], {"problem": "1+1?", "answer": None}]
    with pytest.raises(DataError, match=r"a.parquet row 2: 'answer' must be text or a number, got NoneType"):
        opened(write_parquet(tmp_path / "a.parquet", records))


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"problem": "a \ud83d b", "answer": "2"}, "problem"),
        ({"problem": "1+1?", "answer": "\udfff"}, "answer"),
        ({"problem": [{"role": "user", "content": "\ud800"}], "answer": "2"}, "problem"),
        ({"problem": [{"role": "\ud800", "content": "x"}], "answer": "2"}, "problem"),
        ({"problem": "1+1?", "answer": "2", "source": {"book": ["a", "\ud83d"]}}, "source"),
        ({"problem": "1+1?", "answer": "2", "source": {"\ud83d": 1}}, "source"),
    ],
)
def test_text_that_cannot_be_encoded_is_refused(tmp_path, record, key):
    path = write_jsonl(tmp_path / "a.jsonl", [RECORDS[0], record])
    with pytest.raises(DataError, match=rf"a.jsonl:2: '{key}' contains '\\ud[0-9a-f]+' at character \d") as caught:
        opened(path)
    str(caught.value).encode()


def test_surrogate_pair_is_one_character(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ['{"problem": "a \\ud83d\\ude00 b", "answer": "2"}'])
    assert opened(path)[0].prompt == "a \U0001f600 b"
