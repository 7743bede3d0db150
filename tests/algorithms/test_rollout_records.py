"""The records of a rollout's samples, and their way into the Parquet files of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow.parquet
import torch
from fake_grpo import build
from test_episodes import Countdown, FailsOn, all_left, one, problems
from test_episodes import collect as collect  # a fixture

from nemo_rl.algorithms.branches import training_rows
from nemo_rl.algorithms.on_policy import _samples
from nemo_rl.algorithms.rollout_records import rollout_records
from nemo_rl.algorithms.rollouts import select
from nemo_rl.observability.logger import Logger
from nemo_rl.observability.logger_config import LoggerConfig
from nemo_rl.observability.rollout_files import RolloutFiles, find_rollouts, read_rollouts


def test_trained_batch_is_kept(tmp_path: Path) -> None:
    with Logger(tmp_path, LoggerConfig(tensorboard=False)) as log:
        job = build(
            "grpo.max_num_steps=2", "grpo.validation.at_start=false", "grpo.validation.at_end=false", recorder=log
        )
        job.run()
    for step, batch in enumerate(job.policy.batches, start=1):
        rows = pyarrow.parquet.read_table(tmp_path / "rollouts" / f"step_{step:06d}.parquet").to_pylist()
        assert len(rows) == batch.size
        for index, row in enumerate(rows):
            length = int(batch["input_lengths"][index])
            assert row["tokens"] == batch["input_ids"][index, :length].tolist()
            assert row["token_mask"] == batch["token_mask"][index, :length].bool().tolist()
            assert row["generation_logprobs"] == batch["generation_logprobs"][index, :length].tolist()
            assert row["reward"] == float(batch["rewards"][index])
            assert row["advantage"] == float(batch["advantages"][index])
            assert row["group"] == int(batch["group"][index])
            assert (row["environment"], row["step"], row["weights_version"]) == ("math", step, step - 1)
            assert (row["outcome"], row["sample_mask"], row["sample"]) == ("trained", True, index)


def test_limit_of_0_keeps_none() -> None:
    job = build("grpo.max_num_steps=1", "logger.max_rollouts_mb=0")
    job.run()
    assert job.recorder.rollouts == []


def test_advantages_of_tokens_are_kept() -> None:
    job = build(
        "grpo.max_num_steps=1",
        "loss.kl_coef=0.1",
        "loss.kl_estimator=k1",
        "loss.kl_placement=reward_to_go",
        "policy.train_global_batch_size=8",
    )
    job.run()
    [(_, records)] = job.recorder.rollouts
    batch = job.policy.batches[0]
    assert "advantage" not in records[0]
    assert records[3]["token_advantages"].tolist() == batch["advantages"][3].tolist()


def test_failed_and_replaced_episodes(collect, tmp_path: Path) -> None:
    rollout = collect(problems(2, 3, 1), FailsOn, all_left, max_failed_fraction=0.5)
    kept = dataclasses.replace(select(rollout, torch.tensor([0, 1])), episodes=rollout.episodes)
    kept.episodes[2]["outcome"] = "replaced: not needed"
    rows = training_rows(kept, num_parts=1, multiple_of=1, pad_token_id=0)
    rows.batch["advantages"] = torch.zeros(2)
    records = rollout_records(kept, rows, weights_version=5, environment="unused")
    trained, failed, replaced = records
    assert trained["environment"] == "game"
    assert trained["tokens"].tolist() == rollout.batch["input_ids"][0, : trained["num_tokens"]].tolist()
    assert trained["messages"][1] == {"role": "assistant", "content": "2", "reward": 2.0}
    assert (failed["outcome"], failed["end"], failed["reward"]) == ("masked", "failed", None)
    assert len(failed["tokens"]) == failed["num_tokens"] > 0
    assert (trained["sample_mask"], failed["sample_mask"]) == (True, False)
    assert "the server is gone" in failed["failure"]
    assert (replaced["outcome"], replaced["tokens"], replaced.get("group")) == ("replaced: not needed", None, None)
    RolloutFiles(tmp_path, limit_mb=1, resume_step=None).write(1, records)
    rows = list(read_rollouts([*find_rollouts(tmp_path).values()], ["problem", "end", "messages", "num_tokens"]))
    assert [row["messages"] for row in rows] == [record["messages"] for record in records]
    assert [row["problem"] for row in rows] == ["2", "3", "1"]


def test_samples_are_of_every_environment(collect) -> None:
    batch = problems(1, 2, 3, 1, environment=["a", "a", "a", "b"])
    samples = _samples(collect(batch, {"a": Countdown, "b": Countdown}, one), 2)
    assert [sample["environment"] for sample in samples] == ["a", "a", "b"]
    assert samples[1]["messages"][1]["reward"] == 1
