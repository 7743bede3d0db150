"""Stages of one pipeline that use different versions of the same library."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import packaging
import pytest
import ray
from sample_stages import AddOne, PackagingVersion, batches

from nemo_rl.errors import ClusterError, RuntimeEnvError, UnknownExtraError, VenvBuildError
from nemo_rl.pipelines import DocumentBatch, Executor, Pipeline, ProcessingStage, RayActorPoolExecutor
from nemo_rl.venvs.uv import find_uv

pytestmark = pytest.mark.usefixtures("ray_local")

THREE_VERSIONS = [
    PackagingVersion().with_(name="base"),
    PackagingVersion().with_(name="by pip", runtime_env={"pip": ["packaging==23.2"]}),
    PackagingVersion().with_(name="by uv", runtime_env={"uv": ["packaging==24.0"]}),
]


def test_three_stages_three_versions(executor: Executor, shared_venvs: Path) -> None:
    tasks = Pipeline("versions", stages=[*THREE_VERSIONS, AddOne()]).run(executor, batches(6))
    for task in tasks:
        frame = task.to_pandas()
        assert set(frame["base"]) == {packaging.__version__}
        assert set(frame["by pip"]) == {"23.2"}
        assert set(frame["by uv"]) == {"24.0"}
        assert len(set(frame["base python"]) | set(frame["by pip python"]) | set(frame["by uv python"])) == 3
        assert Path(frame["by uv python"][0]).is_relative_to(shared_venvs)


def test_equal_lists_share_one_overlay(shared_venvs: Path) -> None:
    same = [PackagingVersion().with_(name=name, runtime_env={"uv": ["packaging==24.0"]}) for name in ("one", "two")]
    frame = Pipeline("p", stages=same).run(RayActorPoolExecutor(), batches(1))[0].to_pandas()
    (prefix,) = set(frame["one python"]) | set(frame["two python"])
    size = sum(path.lstat().st_size for path in Path(prefix).rglob("*") if path.is_file() and not path.is_symlink())
    assert size < 5 * 2**20
    installed = {path.name for path in Path(prefix).glob("lib/*/site-packages/*.dist-info")}
    assert installed == {"packaging-24.0.dist-info"}


@pytest.mark.slow  # builds a project's venv
def test_stage_in_another_project(tmp_path: Path) -> None:
    """A `py_executable` selects the lock and extra of that project, not an overlay over the base venv."""
    with_worker = [f"{name}=={metadata.version(name)}" for name in ("ray", "pandas", "pyarrow")]
    (tmp_path / "pyproject.toml").write_text(
        f"""
        [project]
        name = "other"
        version = "1.0"
        requires-python = ">=3.11"
        dependencies = {with_worker}
        [project.optional-dependencies]
        older = ["packaging==24.2"]
        """
    )
    subprocess.run([find_uv(), "lock", "--quiet", "--python", sys.executable], cwd=tmp_path, check=True)
    other = {"py_executable": f"uv run --locked --project {tmp_path} --extra older"}
    stages = [PackagingVersion().with_(name="base"), PackagingVersion().with_(name="other", runtime_env=other)]
    (task,) = Pipeline("p", stages=stages).run(RayActorPoolExecutor(), batches(1))
    frame = task.to_pandas()
    assert set(frame["base"]) == {packaging.__version__}
    assert set(frame["other"]) == {"24.2"}
    assert set(frame["base python"]) == {sys.prefix}
    unknown = PackagingVersion().with_(runtime_env={"py_executable": other["py_executable"] + "r"})
    with pytest.raises(UnknownExtraError, match=r"(?s)stage 'PackagingVersion'.*'olderr'.*older"):
        Pipeline("p", stages=[unknown]).run(RayActorPoolExecutor(), batches(1))


class Never(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Creates a file if it ever runs."""

    def __init__(self, path: str) -> None:
        self.path = path

    def process(self, task: DocumentBatch) -> DocumentBatch:
        Path(self.path).touch()
        return task


def test_unresolvable_list_fails_before_any_task(executor: Executor, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    impossible = PackagingVersion().with_(name="impossible", runtime_env={"uv": ["packaging==23.2", "packaging==24.0"]})
    with pytest.raises(VenvBuildError, match=r"(?s)stage 'impossible'.*packaging==23\.2.*packaging==24\.0"):
        Pipeline("p", stages=[Never(str(trace)), impossible]).run(executor, batches(1))
    assert not trace.exists()


def test_runtime_env_is_checked_before_start() -> None:
    def pipeline(**fields: object) -> Pipeline:
        return Pipeline("p", stages=[AddOne().with_(runtime_env=fields)])

    with pytest.raises(RuntimeEnvError, match=r"stage 'AddOne' has an unknown field 'pips'. Did you mean 'pip'"):
        pipeline(pips=["a"]).run(initial_tasks=batches(1))
    with pytest.raises(RuntimeEnvError, match=r"stage 'AddOne': 'conda' and 'pip' cannot both be given"):
        pipeline(conda="x", pip=["a"]).run(initial_tasks=batches(1))
    with pytest.raises(RuntimeEnvError, match=r"stage 'AddOne'.*'a b' is not a requirement"):
        pipeline(uv=["a b"]).run(initial_tasks=batches(1))
    with pytest.raises(RuntimeEnvError, match=r"stage 'AddOne'\['working_dir'\]"):
        pipeline(working_dir=3).run(initial_tasks=batches(1))
    with pytest.raises(RuntimeEnvError, match="runtime_env of the pipeline"):
        Pipeline("p", stages=[AddOne()], runtime_env={"nope": 1}).run(initial_tasks=batches(1))


def test_required_tools_are_checked_on_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"runtime_env\['image_uri'\] needs podman, which is not on the PATH of"):
        Pipeline("p", stages=[AddOne().with_(runtime_env={"image_uri": "registry/image:1"})]).run(
            initial_tasks=batches(1)
        )


class Shows(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Adds what a runtime_env provided as columns."""

    def process(self, task: DocumentBatch) -> DocumentBatch:
        import os

        try:
            import shipped_module

            module = shipped_module.VALUE
        except ImportError:
            module = "none"
        shown = {
            "variable": os.environ.get("STAGE_VARIABLE", "none"),
            "file": Path("note.txt").read_text() if Path("note.txt").exists() else "none",
            "module": module,
            "hook": os.environ.get("SET_BY_HOOK", "none"),
        }
        return task.with_data(task.to_pandas()[:1].assign(**shown))


def set_by_hook() -> None:
    import os

    os.environ["SET_BY_HOOK"] = "yes"


def test_fields_passed_to_ray(executor: Executor, tmp_path: Path) -> None:
    work, modules = tmp_path / "work", tmp_path / "modules" / "shipped_module"
    work.mkdir()
    modules.mkdir(parents=True)
    (work / "note.txt").write_text("shipped")
    (modules / "__init__.py").write_text("VALUE = 'imported'\n")
    fields = {
        "working_dir": str(work),
        "py_modules": [str(modules)],
        "env_vars": {"STAGE_VARIABLE": "stage"},
        "worker_process_setup_hook": set_by_hook,
    }
    stages = [
        Shows().with_(runtime_env=fields),
        Shows().with_(name="with packages", runtime_env={**fields, "uv": ["packaging==24.0"]}),
        Shows().with_(name="plain"),
    ]
    of_pipeline = {"env_vars": {"STAGE_VARIABLE": "pipeline", "OTHER": "1"}}
    with_fields = {"variable": "stage", "file": "shipped", "module": "imported", "hook": "yes"}
    without_fields = {"variable": "pipeline", "file": "none", "module": "none", "hook": "none"}
    for stage, expected in zip(stages, (with_fields, with_fields, without_fields)):
        (task,) = Pipeline("p", stages=[stage], runtime_env=of_pipeline).run(executor, batches(1))
        row = task.to_pandas().iloc[0].to_dict()
        assert {key: row[key] for key in expected} == expected


@pytest.mark.slow
def test_venvs_are_reused_after_a_ray_restart(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pipeline("versions", stages=THREE_VERSIONS).run(RayActorPoolExecutor(), batches(2))
    ray.shutdown()
    monkeypatch.setenv("NEMO_RL_UV", "/nowhere/uv")  # uv must not be needed
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with caplog.at_level(logging.INFO):
        tasks = Pipeline("versions", stages=THREE_VERSIONS).run(RayActorPoolExecutor(), batches(2))
    assert set(tasks[0].to_pandas()["by pip"]) == {"23.2"}


class TokenizerVersion(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Saves and loads a tokenizer, and tokenizes a text."""

    def setup(self) -> None:
        import tempfile

        import transformers
        from tokenizers import Tokenizer, models, pre_tokenizers

        vocabulary = {"[UNK]": 0, "one": 1, "two": 2}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        folder = tempfile.mkdtemp()
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.version = transformers.__version__

    def process(self, task: DocumentBatch) -> DocumentBatch:
        ids = self.tokenizer("one two three")["input_ids"]
        return task.with_data(task.to_pandas().assign(**{self.name: self.version, f"{self.name} ids": str(ids)}))


@pytest.mark.slow
def test_incompatible_transformers_versions(executor: Executor) -> None:
    old = {"uv": ["transformers==4.46.3"]}  # needs tokenizers<0.21; the base's version needs a newer one
    stages = [TokenizerVersion().with_(name="new"), TokenizerVersion().with_(name="old", runtime_env=old)]
    frame = Pipeline("p", stages=stages).run(executor, batches(2))[0].to_pandas()
    assert set(frame["old"]) == {"4.46.3"}
    assert set(frame["new"]) != {"4.46.3"}
    assert set(frame["old ids"]) == set(frame["new ids"]) == {"[1, 2, 0]"}
