"""The loop, with fakes at its protocol seams: a policy that is one number, a generator that answers with it."""

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import RayTaskError

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.algorithms.grpo import GRPO
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.environments.interfaces import EnvironmentReturn
from nemo_rl.errors import CheckpointError, ConfigError, EnvironmentFailure, LogprobMismatchError, WeightSyncError
from nemo_rl.models.generation.interfaces import GenerationResult
from nemo_rl.models.policy.interfaces import TrainResult
from nemo_rl.models.weights.interfaces import WeightUpdate
from nemo_rl.utils.checkpoint import CheckpointStore
from nemo_rl.utils.config import load_config

PAD = 0


@dataclass
class FakePolicy:
    """`skill` grows by the mean positive advantage; a completion is right with probability `skill`."""

    skill: float = 0.3
    batches: list[BatchedDataDict] = field(default_factory=list)
    logprob_offset: float = 0.0

    def get_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        return batch["generation_logprobs"] + self.logprob_offset * batch["token_mask"]

    def get_reference_policy_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        return torch.zeros_like(batch["generation_logprobs"])

    def train(self, batch: BatchedDataDict, loss_fn: Any) -> TrainResult:
        self.batches.append(batch)
        self.skill += 0.01 * float(batch["advantages"].clamp(min=0).mean())
        return TrainResult({"loss": -self.skill, "grad_norm": 1.0})

    def publish_weights(self, version: int, dtype: str) -> WeightUpdate:
        return WeightUpdate(version, "fake", (), digest=repr(self.skill))

    def offer_weights(self, version: int, dtype: str) -> WeightUpdate:
        return self.publish_weights(version, dtype)

    def save_checkpoint(self, directory: Path) -> None:
        directory.mkdir()
        (directory / "skill").write_text(repr(self.skill))

    def load_checkpoint(self, directory: Path) -> None:
        self.skill = float((directory / "skill").read_text())


@dataclass
class FakeGeneration:
    weights: str | None = None
    corrupt: bool = False
    num_calls: int = 0
    num_in_flight: int = 0
    syncs: list[int] = field(default_factory=list)

    def update_weights(self, update: WeightUpdate, *, in_flight: bool = False) -> str:
        self.num_in_flight += in_flight
        self.syncs.append(update.version)
        self.weights = "garbage" if self.corrupt else update.digest
        return self.weights

    def generate(self, prompts, *, seed, num_generations=1, greedy=False, sampling=None) -> GenerationResult:
        self.num_calls += 1
        count = prompts.size * num_generations
        right = np.random.default_rng(seed).random(count) < float(self.weights)
        ids = torch.full((count, 3), 7)
        return GenerationResult(
            output_ids=ids,
            output_lengths=torch.full((count,), 3),
            prompt_lengths=torch.ones(count, dtype=torch.long),
            logprobs=torch.tensor([[0.0, -1.0, -1.0]]).repeat(count, 1),
            sampling_logprobs=torch.zeros(count, 3),
            truncated=torch.zeros(count, dtype=torch.bool),
            texts=["right" if r else "wrong" for r in right],
            weights_version=0,
        )


@dataclass
class FakeEnvironment:
    fails: bool = False

    def step(self, completions, metadata) -> EnvironmentReturn:
        if self.fails:
            raise EnvironmentFailure("the environment has died")
        count = len(completions)
        return EnvironmentReturn(
            rewards=np.array([c == "right" for c in completions], dtype=np.float32),
            terminated=np.ones(count, dtype=bool),
            answers=list(completions),
            status=["ok"] * count,
            latency_s=np.zeros(count),
        )

    def global_post_process_and_metrics(self, result):
        return result, {"accuracy": float(result.rewards.mean())}


@dataclass
class FakeLoader:
    position: int = 0
    length: int | None = None

    def next_batch(self, num_problems: int) -> BatchedDataDict | None:
        if self.length is not None and self.position >= self.length:
            return None
        start, self.position = self.position, self.position + num_problems
        return problems(num_problems, start)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@dataclass
class Recorder:
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def log_metrics(self, step, metrics):
        self.metrics.append({"step": step, **metrics})

    def log_samples(self, step, samples):
        self.samples.extend(samples)


def problems(count: int, start: int = 0) -> BatchedDataDict:
    return BatchedDataDict(
        input_ids=torch.full((count, 1), 5),
        input_lengths=torch.ones(count, dtype=torch.long),
        prompt=[f"p{start + i}" for i in range(count)],
        answer=["right"] * count,
        metadata=[{}] * count,
    )


def build(*overrides: str, directory: Path | None = None, **parts: Any) -> GRPO:
    config = load_config(
        MasterConfig,
        None,
        ["grpo.num_prompts_per_step=4", "grpo.num_generations_per_prompt=4", "grpo.max_num_steps=6", *overrides],
    )
    parts = {
        "policy": FakePolicy(),
        "generation": FakeGeneration(),
        "environment": FakeEnvironment(),
        "loader": FakeLoader(),
        "validation": problems(8),
        "recorder": Recorder(),
        "checkpoints": CheckpointStore(directory, config.checkpointing) if directory else None,
        **parts,
    }
    return GRPO(config=config, pad_token_id=PAD, **parts)


def without_times(records: list[dict[str, Any]]) -> str:
    return json.dumps([{k: v for k, v in r.items() if not k.startswith(("timing/", "perf/"))} for r in records])


def test_a_run_trains_all_steps_validates_and_says_why_it_ended():
    job = build("grpo.validation.period=2")
    assert job.run() == "all 6 steps are done"
    assert [r["step"] for r in job.recorder.metrics if "train/loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in job.recorder.metrics if "val/accuracy" in r] == [0, 2, 4, 6]
    assert len(job.recorder.samples) == 4 * 8
    # Generation always serves the weights after the step before, and is told only when they have changed.
    assert job.generation.syncs == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("killed_after", [1, 3, 4])
def test_a_resumed_run_records_what_an_undisturbed_one_does(tmp_path, killed_after):
    options = ("checkpointing.save_period=1", "grpo.validation.period=2")
    whole = build(*options, directory=tmp_path / "whole")
    whole.run()

    first = build(
        *options, f"grpo.max_num_steps={killed_after}", "grpo.validation.at_end=false", directory=tmp_path / "x"
    )
    first.run()
    second = build(*options, directory=tmp_path / "x")
    second.resume(second.checkpoints.latest())
    second.run()
    records = first.recorder.metrics + second.recorder.metrics
    # The check against the generator also runs at the first step of the second life.
    for record in records + whole.recorder.metrics:
        record.pop("train/logprob_error", None)
    assert without_times(records) == without_times(whole.recorder.metrics)
    assert second.policy.skill == whole.policy.skill


def test_generation_that_disagrees_stops_the_run_before_the_gradient():
    job = build(policy=FakePolicy(logprob_offset=0.5))
    with pytest.raises(LogprobMismatchError, match=r"differ by 0\.5 nats.*max_mean_error=0\.02"):
        job.run()
    assert job.policy.batches == []


def test_generation_that_serves_other_weights_stops_the_run():
    job = build(generation=FakeGeneration(corrupt=True))
    with pytest.raises(WeightSyncError, match="garbage"):
        job.run()


def test_a_failed_environment_is_an_error_and_never_reaches_the_gradient():
    job = build("grpo.validation.at_start=false", environment=FakeEnvironment(fails=True))
    with pytest.raises(EnvironmentFailure):
        job.run()
    assert job.policy.batches == []


def test_dynamic_sampling_fills_the_batch_with_groups_that_teach():
    job = build("grpo.dynamic_sampling.enabled=true", "grpo.max_num_steps=1", "grpo.validation.at_start=false")
    job.policy.skill = 0.05
    job.run()
    batch = job.policy.batches[0]
    assert batch.size == 16
    by_group = batch["rewards"].view(4, 4)
    assert ((by_group.sum(dim=1) > 0) & (by_group.sum(dim=1) < 4)).all()
    assert job.recorder.metrics[0]["train/num_rollouts"] > 1


def test_dynamic_sampling_gives_up_at_its_limit_and_still_fills_the_batch():
    job = build(
        "grpo.dynamic_sampling.enabled=true",
        "grpo.dynamic_sampling.max_generation_batches=3",
        "grpo.max_num_steps=1",
        "grpo.validation.at_start=false",
    )
    job.policy.skill = 1.0
    job.run()
    assert job.policy.batches[0].size == 16
    assert job.recorder.metrics[0]["train/num_rollouts"] == 3
    assert job.policy.batches[0]["advantages"].abs().max() == 0


def test_early_stop_ends_the_run_at_the_validation_that_reaches_it():
    job = build("grpo.early_stop.threshold=0.2", "grpo.validation.period=1", "grpo.validation.max_num_problems=8")
    job.policy.skill = 1.0
    assert job.run() == "val/accuracy reached 1.000"
    assert job.step == 0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "grpo.early_stop.metric=val/acuracy",
            "grpo.early_stop.metric=val/acuracy is not measured. Did you mean",
        ),
        ("checkpointing.metric_name=train/reward", "checkpointing.metric_name=train/reward is not measured"),
    ],
)
def test_a_metric_that_nobody_measures_is_refused_before_the_first_step(override, expected):
    job = build(override)
    with pytest.raises(ConfigError, match=expected):
        job.run()
    assert job.step == 0


def test_a_checkpoint_that_cannot_be_used_says_so_in_one_sentence_and_what_to_do(tmp_path):
    class OtherModel(FakePolicy):
        def load_checkpoint(self, directory):
            error = RayTaskError("load_checkpoint", "a long traceback", CheckpointError("of another model"))
            raise error.as_instanceof_cause()

    build("checkpointing.save_period=1", "grpo.max_num_steps=1", directory=tmp_path).run()
    job = build(directory=tmp_path, policy=OtherModel())
    checkpoint = job.checkpoints.latest()
    with pytest.raises(
        CheckpointError, match=f"^of another model. If it is damaged, remove {checkpoint.path}"
    ) as raised:
        job.resume(checkpoint)
    assert "traceback" not in str(raised.value)


def test_epochs_limit_the_run():
    job = build("grpo.max_num_epochs=1", loader=FakeLoader(length=8))
    assert job.run() == "all 1 epochs are done"
    assert job.step == 2


def test_validation_with_several_generations_reports_pass_at_k():
    job = build("grpo.validation.num_generations=4", "grpo.max_num_steps=1")
    job.run()
    record = job.recorder.metrics[0]
    assert record["val/pass@1"] == pytest.approx(record["val/accuracy"])
    assert record["val/pass@1"] <= record["val/pass@2"] <= record["val/pass@4"]


def test_old_logprobs_are_computed_only_where_they_differ_from_the_current_ones():
    once = build("grpo.max_num_steps=1")
    once.run()
    assert "prev_logprobs" not in once.policy.batches[0]
    twice = build("grpo.max_num_steps=1", "grpo.num_updates_per_step=2")
    twice.run()
    assert len(twice.policy.batches) == 2
    assert "prev_logprobs" in twice.policy.batches[0]
    minibatches = build("grpo.max_num_steps=1", "policy.train_global_batch_size=8")
    minibatches.run()
    assert "prev_logprobs" in minibatches.policy.batches[0]


def test_reference_logprobs_are_asked_for_only_with_a_kl_term():
    for coefficient, expected in (("0", False), ("0.1", True)):
        job = build("grpo.max_num_steps=1", f"loss.kl_coef={coefficient}")
        job.run()
        assert ("reference_policy_logprobs" in job.policy.batches[0]) is expected


# --- rollouts ahead --------------------------------------------------------------------------------------------------

AHEAD = ("grpo.max_trajectory_age=1", "grpo.logprob_check.period=100")


def test_rollouts_ahead_are_made_with_weights_of_the_step_before():
    job = build(*AHEAD, "grpo.validation.at_start=false", "grpo.validation.period=0")
    job.run()
    records = [r for r in job.recorder.metrics if "train/loss" in r]
    assert [r["train/trajectory_age"] for r in records] == [0, 1, 1, 1, 1, 1]
    # Steps 1 and 2 share the first weights; none is made for a step beyond the last.
    assert job.generation.num_calls == 6 + 1
    assert job.generation.syncs == [0, 1, 2, 3, 4, 6]


def test_rollouts_lag_by_no_more_than_allowed():
    job = build("grpo.max_trajectory_age=3", "grpo.logprob_check.period=100", "grpo.validation.period=2")
    job.run()
    ages = [r["train/trajectory_age"] for r in job.recorder.metrics if "train/loss" in r]
    assert max(ages) == 3


def test_steps_that_compare_logprobs_are_not_made_ahead():
    job = build("grpo.max_trajectory_age=2", "grpo.logprob_check.period=3")
    job.run()
    records = [r for r in job.recorder.metrics if "train/loss" in r]
    compared = [r["step"] for r in records if "train/logprob_error" in r]
    assert compared == [1, 3, 6]
    assert all(r["train/trajectory_age"] == 0 for r in records if r["step"] in compared)


def test_a_rollout_ahead_that_fails_ends_the_run_before_its_gradient():
    job = build(*AHEAD, "grpo.validation.at_start=false", environment=FakeEnvironment(fails=True))
    with pytest.raises(EnvironmentFailure):
        job.run()
    assert job.policy.batches == []


@pytest.mark.parametrize("killed_after", [1, 3, 4])
def test_a_resumed_run_goes_on_with_the_rollouts_that_were_ahead(tmp_path, killed_after):
    options = (*AHEAD, "checkpointing.save_period=1", "grpo.validation.period=2", "grpo.dynamic_sampling.enabled=true")
    whole = build(*options, directory=tmp_path / "whole")
    whole.run()
    first = build(*options, directory=tmp_path / "x")
    original = first._save

    def save_and_die():
        original()
        if first.step == killed_after:
            raise KeyboardInterrupt

    first._save = save_and_die
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = build(*options, directory=tmp_path / "x")
    second.resume(second.checkpoints.latest())
    second.run()
    records = first.recorder.metrics + second.recorder.metrics
    assert without_times(records) == without_times(whole.recorder.metrics)


def test_rollouts_ahead_end_with_the_problems():
    job = build(*AHEAD, "grpo.max_num_epochs=1", loader=FakeLoader(length=8))
    assert job.run() == "all 1 epochs are done"
    assert job.step == 2


def test_older_weights_need_a_correction():
    with pytest.raises(ConfigError, match="needs loss.importance_correction"):
        build(*AHEAD, "loss.importance_correction=none")


ON_ONE_GPU = ("cluster.gpus_per_node=1", "grpo.max_num_steps=2", "grpo.validation.at_start=false")
SLEEPS = ("policy.generation.backend=vllm",)


def events_of(*overrides: str) -> list[str]:
    """What a run of two steps and a last validation asks of policy and generation, in order."""
    events: list[str] = []

    class Generation(FakeGeneration):
        def wake(self, tags=None):
            events.append(f"wake {','.join(tags or ['all'])}")

        def sleep(self):
            events.append("sleep")

        def update_weights(self, update, *, in_flight=False):
            events.append("update")
            return super().update_weights(update, in_flight=in_flight)

        def generate(self, *args, **kwargs):
            events.append("generate")
            return super().generate(*args, **kwargs)

    class Policy(FakePolicy):
        def offload(self, *, keep_weights=False):
            events.append("leave, but for the weights" if keep_weights else "leave")

        def get_logprobs(self, batch):
            events.append("logprobs")
            return super().get_logprobs(batch)

        def train(self, batch, loss_fn):
            events.append("train")
            return super().train(batch, loss_fn)

    build(*ON_ONE_GPU, *overrides, policy=Policy(), generation=Generation()).run()
    return events


def test_policy_and_generation_take_turns_on_shared_gpus():
    generates = ["update", "leave", "wake kv_cache", "generate", "sleep"]
    assert events_of(*SLEEPS) == [
        # generation is awake when it has started
        *["leave, but for the weights", "update", "leave", "generate", "sleep", "logprobs", "train"],
        *["leave, but for the weights", "wake weights", *generates, "train"],
        *["leave, but for the weights", "wake weights", *generates],
    ]


def test_weights_that_generation_has_already_are_not_asked_for():
    events = events_of(*SLEEPS, "grpo.validation.at_start=true", "grpo.max_num_steps=1")
    rollout = events[events.index("sleep") + 1 :]
    assert rollout[:4] == ["leave", "wake all", "generate", "sleep"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("policy.offload=false", *SLEEPS),
        ("policy.generation.backend=torch",),  # which does not sleep
        ("policy.generation.backend=vllm", "policy.generation.options.enable_sleep_mode=false"),
    ],
)
def test_a_policy_that_need_not_leave_stays(overrides):
    events = events_of(*overrides)
    assert not [event for event in events if event.startswith("leave")]
    assert "sleep" in events


@pytest.mark.parametrize("overrides", [("cluster.generation.gpus_per_node=1",), AHEAD])
def test_nobody_takes_turns_where_each_has_its_own_time_or_place(overrides):
    assert set(events_of(*SLEEPS, *overrides)) == {"update", "generate", "logprobs", "train"}


def test_a_policy_leaves_a_cpu_too_where_asked_to():
    events = events_of("cluster.gpus_per_node=0", "policy.offload=true")
    assert events[:5] == ["leave, but for the weights", "update", "leave", "generate", "logprobs"]


def test_a_policy_that_trains_ahead_cannot_leave():
    with pytest.raises(ConfigError, match=r"policy\.offload=true: with grpo\.max_trajectory_age=1"):
        build(*AHEAD, "policy.offload=true")


class SlowGeneration(FakeGeneration):
    """From the second on, a call lasts until weights change under it, or for `patience_s`."""

    def __init__(self, patience_s: float) -> None:
        super().__init__()
        self.patience_s = patience_s
        self.changed = threading.Event()

    def update_weights(self, update, *, in_flight=False):
        if in_flight:
            self.changed.set()
        return super().update_weights(update, in_flight=in_flight)

    def generate(self, *args, **kwargs):
        if self.num_calls:
            self.changed.wait(self.patience_s)
        return super().generate(*args, **kwargs)


@pytest.mark.parametrize(("wanted", "patience_s"), [(False, 0.3), (True, 60.0)])
def test_weights_reach_a_rollout_that_is_under_way_only_where_asked_for(wanted, patience_s):
    generation = SlowGeneration(patience_s)
    quick = ("grpo.max_num_steps=3", "grpo.validation={at_start: false, at_end: false, period: 0}")
    build(*AHEAD, *quick, f"grpo.in_flight_weight_updates={wanted}", generation=generation).run()
    assert (generation.num_in_flight > 0) is wanted
