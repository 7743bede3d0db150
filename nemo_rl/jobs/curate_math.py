"""Curates raw math problems into a file that GRPO trains on.

::

    JSONL ─▶ repair text ─▶ filter ─▶ exact duplicates ─▶ near duplicates ─▶ answers, by two versions of sympy
          ─▶ difficulty, from solution length or a model's pass rate ─▶ problems.parquet, report.html
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field

from nemo_rl.data.sample_math import SampleKind, write_messy_math
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.command_line import JobArguments, run_command
from nemo_rl.jobs.model_scoring import ModelPassRate, ScoringConfig
from nemo_rl.jobs.run_directory import start_of_run
from nemo_rl.pipelines import Executor, FileGroupTask, Pipeline, RayActorPoolExecutor, RayDataExecutor, XennaExecutor
from nemo_rl.pipelines.io.readers import JsonlReader
from nemo_rl.pipelines.io.writers import SingleParquetWriter
from nemo_rl.pipelines.report import write_report
from nemo_rl.pipelines.stages.dedup import ExactDuplicateFilter, NearDuplicates
from nemo_rl.pipelines.stages.grading import SolutionEffortGrade
from nemo_rl.pipelines.stages.language import LanguageFilter
from nemo_rl.pipelines.stages.math_answers import MathAnswerCheck
from nemo_rl.pipelines.stages.text import TextFilter, TextRepair
from nemo_rl.utils.config import ConfigModel

logger = logging.getLogger(__name__)

COLUMNS = {"problem": "string", "answer": "string", "solution": "string"}
OUTPUT_FILE = "problems.parquet"
HELD_OUT_FILE = "held_out.parquet"


class SampleConfig(ConfigModel):
    """Configures the sample that is generated if no input is given."""

    kind: SampleKind = Field(
        "word_problems", description="word_problems, or arithmetic, which the embedded model can learn."
    )
    num_lines: int = Field(2000, ge=1, description="Number of lines, valid and invalid ones.")
    seed: int = Field(0, description="Seed of the sample.")


class InputConfig(ConfigModel):
    """Configures the input: JSON lines with the keys problem, answer and solution."""

    paths: list[str] = Field(
        default=[], description="Files, directories, glob patterns or fsspec URLs. Empty generates a sample."
    )
    sample: SampleConfig = Field(default_factory=SampleConfig)
    fallback_encoding: str | None = Field(
        "cp1252", description="Encoding of lines that are not UTF-8. Null rejects these lines."
    )
    task_size: str = Field("256KiB", description="Bytes that one task reads.")


class DedupConfig(ConfigModel):
    """Configures when two problems are duplicates."""

    threshold: float = Field(0.7, gt=0, lt=1, description="Minimum Jaccard similarity of the shingles of duplicates.")
    shingle_words: int = Field(3, ge=1, description="Words per shingle.")
    protect_numbers: bool = Field(True, description="Problems with different numbers are never duplicates.")


class VerifyConfig(ConfigModel):
    """Configures how answers are verified."""

    sympy_versions: list[str] = Field(
        default=["1.13.3", "1.12.1"],
        min_length=1,
        description="SymPy versions. Each version is a stage in its own venv.",
    )
    timeout_s: float = Field(5.0, gt=0, description="CPU time limit per answer, in seconds.")


class CurateConfig(ConfigModel):
    """Configures the curation job."""

    input: InputConfig = Field(default_factory=InputConfig)
    output_dir: str = Field(
        "results/curate_math", description="Directory of the result, the report and the run directory."
    )
    executor: Literal["actor_pool", "ray_data", "xenna"] = Field(
        "actor_pool", description="Executor of the pipeline. xenna needs the extra `xenna`."
    )
    min_problem_chars: int = Field(20, ge=0, description="Drop shorter problems.")
    max_problem_chars: int = Field(4000, ge=1, description="Drop longer problems.")
    dedup: DedupConfig = Field(default_factory=DedupConfig)
    languages: list[str] = Field(
        default=[], description="ISO 639 codes of the languages to keep. Formulas are always kept. Empty keeps all."
    )
    verify: VerifyConfig = Field(default_factory=VerifyConfig)
    scoring: ScoringConfig = Field(default_factory=ScoringConfig)
    held_out_share: float = Field(
        0.0, ge=0, lt=1, description="Fraction of the problems that is written to held_out.parquet for validation."
    )
    max_retries: int = Field(1, ge=0, description="Maximum retries of a failed task.")


def main(argv: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command line of math curation and return its exit code; see `run_command`."""
    return run_command(CurateConfig, "curate_math", run_curate, argv, program=program)


def run_curate(arguments: JobArguments[CurateConfig]) -> None:
    """Run the curation job. After a crash the same command resumes it."""
    config = arguments.config
    output = Path(config.output_dir)
    if arguments.dry_run:
        logger.info("%s", curation_pipeline(config, config.input.paths or ["(generated sample)"]).describe())
        return
    if config.scoring.model is not None:
        ModelPassRate(config.scoring).check_model()
    paths = config.input.paths or [str(_sample(config.input.sample, output))]
    pipeline = curation_pipeline(config, paths, start_of_run(output / "run"))
    try:
        tasks = pipeline.run(_executor(config), run_dir=output / "run", max_retries=config.max_retries)
    finally:
        if (output / "run" / "stages.json").exists():
            report = write_report(output / "run", output / "report.html", title="Curation of math problems")
            logger.info("report: %s", report)
    written = {task.data[0]: task._metadata["num_rows"] for task in tasks if isinstance(task, FileGroupTask)}
    if not any(written.values()):
        raise ConfigError(f"no problem of {', '.join(paths)} was kept; {output / 'report.html'} lists the reasons")
    for path, num_rows in written.items():
        logger.info("%d problems in %s", num_rows, path)
    held_out = f" data.validation.path={output / HELD_OUT_FILE}" if config.held_out_share else ""
    logger.info("train with: uv run examples/run_grpo_math.py data.train.path=%s%s", output / OUTPUT_FILE, held_out)


def curation_pipeline(config: CurateConfig, paths: list[str], started: datetime | None = None) -> Pipeline:
    """Return the pipeline of the job: read, clean, deduplicate, verify, grade, write.

    Args:
        config: the configuration of the job.
        paths: the input files.
        started: when the run began; see `ModelPassRate`.
    """
    checks = [
        MathAnswerCheck(
            solution="solution" if index == 0 else None, timeout_s=config.verify.timeout_s, output=f"checked_by_{index}"
        ).with_(name=f"CheckAnswers (sympy {version})", runtime_env={"uv": [f"sympy=={version}"]})
        for index, version in enumerate(config.verify.sympy_versions)
    ]
    return Pipeline(
        "curate math",
        "Curates raw problems into training data.",
        stages=[
            JsonlReader(
                paths,
                columns=COLUMNS,
                task_size=config.input.task_size,
                fallback_encoding=config.input.fallback_encoding,
                broken_lines="set_aside",
                dataset_name="math",
            ),
            TextRepair(list(COLUMNS)),
            TextFilter("problem", min_chars=config.min_problem_chars, max_chars=config.max_problem_chars),
            *([LanguageFilter("problem", keep=config.languages)] if config.languages else []),
            ExactDuplicateFilter(["problem"], ignore_case_and_spaces=True),
            NearDuplicates(
                "problem",
                threshold=config.dedup.threshold,
                shingle_words=config.dedup.shingle_words,
                protect_numbers=config.dedup.protect_numbers,
            ),
            *checks,
            SolutionEffortGrade() if config.scoring.model is None else ModelPassRate(config.scoring, started=started),
            _writer(config),
        ],
    )


def _writer(config: CurateConfig) -> SingleParquetWriter:
    output = Path(config.output_dir)
    if not config.held_out_share:
        return SingleParquetWriter(output / OUTPUT_FILE)
    return SingleParquetWriter(
        output / OUTPUT_FILE, held_out=output / HELD_OUT_FILE, held_out_share=config.held_out_share, key="problem"
    )


def _executor(config: CurateConfig) -> Executor:
    executors: dict[str, Callable[[], Executor]] = {
        "actor_pool": RayActorPoolExecutor,
        "ray_data": RayDataExecutor,
        "xenna": XennaExecutor,
    }
    return executors[config.executor]()


def _sample(config: SampleConfig, output: Path) -> Path:
    path = output / f"sample-{config.kind}-{config.num_lines}-{config.seed}.jsonl"
    if not path.exists():
        sample = write_messy_math(path, config.num_lines, config.seed, config.kind)
        logger.info("input.paths is empty: generated a sample of %s", dict(sample.counts))
    return path
