"""Tests the GRPO loop with in-memory implementations of its interfaces: the policy is a single number."""

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
    """Has one weight, `skill`: the probability of a correct completion. It grows by the mean positive advantage."""

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
            raise EnvironmentFailure("the grader died")
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


def without_timings(records: list[dict[str, Any]]) -> str:
    return json.dumps([{k: v for k, v in r.items() if not k.startswith(("timing/", "perf/"))} for r in records])


def test_run_trains_validates_and_returns_the_reason():
    job = build("grpo.validation.period=2")
    assert job.run() == "all 6 steps are done"
    assert [r["step"] for r in job.recorder.metrics if "train/loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in job.recorder.metrics if "val/accuracy" in r] == [0, 2, 4, 6]
    assert len(job.recorder.samples) == 4 * 8
    # Generation always uses the weights of the previous step and is updated only when they changed.
    assert job.generation.syncs == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("killed_after", [1, 3, 4])
def test_resumed_run_equals_an_uninterrupted_run(tmp_path, killed_after):
    options = ("checkpointing.save_period=1", "grpo.validation.period=2")
    uninterrupted = build(*options, directory=tmp_path / "uninterrupted")
    uninterrupted.run()

    first = build(
        *options, f"grpo.max_num_steps={killed_after}", "grpo.validation.at_end=false", directory=tmp_path / "x"
    )
    first.run()
    second = build(*options, directory=tmp_path / "x")
    second.resume(second.checkpoints.latest())
    second.run()
    records = first.recorder.metrics + second.recorder.metrics
    # The logprob check also runs at the first step after a resume.
    for record in records + uninterrupted.recorder.metrics:
        record.pop("train/logprob_error", None)
    assert without_timings(records) == without_timings(uninterrupted.recorder.metrics)
    assert second.policy.skill == uninterrupted.policy.skill


def test_logprob_mismatch_stops_the_run_before_training():
    job = build(policy=FakePolicy(logprob_offset=0.5))
    with pytest.raises(LogprobMismatchError, match=r"differ by 0\.5 nats.*max_mean_error=0\.02"):
        job.run()
    assert job.policy.batches == []


def test_digest_mismatch_stops_the_run():
    job = build(generation=FakeGeneration(corrupt=True))
    with pytest.raises(WeightSyncError, match="garbage"):
        job.run()


def test_environment_failure_stops_the_run_before_training():
    job = build("grpo.validation.at_start=false", environment=FakeEnvironment(fails=True))
    with pytest.raises(EnvironmentFailure):
        job.run()
    assert job.policy.batches == []


def test_dynamic_sampling_fills_the_batch_with_signal():
    job = build("grpo.dynamic_sampling.enabled=true", "grpo.max_num_steps=1", "grpo.validation.at_start=false")
    job.policy.skill = 0.05
    job.run()
    batch = job.policy.batches[0]
    assert batch.size == 16
    by_group = batch["rewards"].view(4, 4)
    assert ((by_group.sum(dim=1) > 0) & (by_group.sum(dim=1) < 4)).all()
    assert job.recorder.metrics[0]["train/num_rollouts"] > 1


def test_dynamic_sampling_stops_at_its_limit():
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


def test_early_stop_ends_the_run():
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
def test_unknown_metric_is_refused_before_the_first_step(override, expected):
    job = build(override)
    with pytest.raises(ConfigError, match=expected):
        job.run()
    assert job.step == 0


def test_unusable_checkpoint_error_names_the_fix(tmp_path):
    class OtherModel(FakePolicy):
        def load_checkpoint(self, directory):
            error = RayTaskError("load_checkpoint", "a long traceback", CheckpointError("of another model"))
            raise error.as_instanceof_cause()

    build("checkpointing.save_period=1", "grpo.max_num_steps=1", directory=tmp_path).run()
    job = build(directory=tmp_path, policy=OtherModel())
    checkpoint = job.checkpoints.latest()
    with pytest.raises(
        CheckpointError, match=f"^of another model. If the checkpoint is damaged, remove {checkpoint.path}"
    ) as raised:
        job.resume(checkpoint)
    assert "traceback" not in str(raised.value)


def test_epochs_limit_the_run():
    job = build("grpo.max_num_epochs=1", loader=FakeLoader(length=8))
    assert job.run() == "all 1 epochs are done"
    assert job.step == 2


def test_validation_reports_pass_at_k():
    job = build("grpo.validation.num_generations=4", "grpo.max_num_steps=1")
    job.run()
    record = job.recorder.metrics[0]
    assert record["val/pass@1"] == pytest.approx(record["val/accuracy"])
    assert record["val/pass@1"] <= record["val/pass@2"] <= record["val/pass@4"]


def test_old_logprobs_are_computed_only_for_several_updates():
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


def test_reference_logprobs_are_computed_only_with_a_kl_term():
    for coefficient, expected in (("0", False), ("0.1", True)):
        job = build("grpo.max_num_steps=1", f"loss.kl_coef={coefficient}")
        job.run()
        assert ("reference_policy_logprobs" in job.policy.batches[0]) is expected


AHEAD = ("grpo.max_trajectory_age=1", "grpo.logprob_check.period=100")


def test_rollouts_ahead_use_older_weights():
    job = build(*AHEAD, "grpo.validation.at_start=false", "grpo.validation.period=0")
    job.run()
    records = [r for r in job.recorder.metrics if "train/loss" in r]
    assert [r["train/trajectory_age"] for r in records] == [0, 1, 1, 1, 1, 1]
    # Steps 1 and 2 use the first weights. No rollout is generated beyond the last step.
    assert job.generation.num_calls == 6 + 1
    assert job.generation.syncs == [0, 1, 2, 3, 4, 6]


def test_trajectory_age_is_bounded():
    job = build("grpo.max_trajectory_age=3", "grpo.logprob_check.period=100", "grpo.validation.period=2")
    job.run()
    ages = [r["train/trajectory_age"] for r in job.recorder.metrics if "train/loss" in r]
    assert max(ages) == 3


def test_check_steps_are_not_rolled_out_ahead():
    job = build("grpo.max_trajectory_age=2", "grpo.logprob_check.period=3")
    job.run()
    records = [r for r in job.recorder.metrics if "train/loss" in r]
    compared = [r["step"] for r in records if "train/logprob_error" in r]
    assert compared == [1, 3, 6]
    assert all(r["train/trajectory_age"] == 0 for r in records if r["step"] in compared)


def test_failed_rollout_ahead_stops_the_run_before_training():
    job = build(*AHEAD, "grpo.validation.at_start=false", environment=FakeEnvironment(fails=True))
    with pytest.raises(EnvironmentFailure):
        job.run()
    assert job.policy.batches == []


@pytest.mark.parametrize("killed_after", [1, 3, 4])
def test_resumed_run_reuses_the_rollouts_ahead(tmp_path, killed_after):
    options = (*AHEAD, "checkpointing.save_period=1", "grpo.validation.period=2", "grpo.dynamic_sampling.enabled=true")
    uninterrupted = build(*options, directory=tmp_path / "uninterrupted")
    uninterrupted.run()
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
    assert without_timings(records) == without_timings(uninterrupted.recorder.metrics)


def test_rollouts_ahead_stop_after_the_last_epoch():
    job = build(*AHEAD, "grpo.max_num_epochs=1", loader=FakeLoader(length=8))
    assert job.run() == "all 1 epochs are done"
    assert job.step == 2


def test_older_weights_need_importance_correction():
    with pytest.raises(ConfigError, match="needs loss.importance_correction"):
        build(*AHEAD, "loss.importance_correction=none")


ON_ONE_GPU = ("cluster.gpus_per_node=1", "grpo.max_num_steps=2", "grpo.validation.at_start=false")
SLEEPS = ("policy.generation.backend=vllm",)


def record_calls(*overrides: str) -> list[str]:
    """Return the calls to policy and generation in a run of two steps and a final validation."""
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
            events.append("offload but weights" if keep_weights else "offload")

        def get_logprobs(self, batch):
            events.append("logprobs")
            return super().get_logprobs(batch)

        def train(self, batch, loss_fn):
            events.append("train")
            return super().train(batch, loss_fn)

    build(*ON_ONE_GPU, *overrides, policy=Policy(), generation=Generation()).run()
    return events


def test_policy_and_generation_alternate_on_shared_gpus():
    generates = ["update", "offload", "wake kv_cache", "generate", "sleep"]
    assert record_calls(*SLEEPS) == [
        # Generation starts awake.
        *["offload but weights", "update", "offload", "generate", "sleep", "logprobs", "train"],
        *["offload but weights", "wake weights", *generates, "train"],
        *["offload but weights", "wake weights", *generates],
    ]


def test_current_weights_are_not_published_again():
    events = record_calls(*SLEEPS, "grpo.validation.at_start=true", "grpo.max_num_steps=1")
    rollout = events[events.index("sleep") + 1 :]
    assert rollout[:4] == ["offload", "wake all", "generate", "sleep"]


@pytest.mark.parametrize(
    "overrides",
    [
        ("policy.offload=false", *SLEEPS),
        ("policy.generation.backend=torch",),  # does not support sleep
        ("policy.generation.backend=vllm", "policy.generation.options.enable_sleep_mode=false"),
    ],
)
def test_policy_is_not_offloaded_when_disabled(overrides):
    events = record_calls(*overrides)
    assert not [event for event in events if event.startswith("offload")]
    assert "sleep" in events


@pytest.mark.parametrize("overrides", [("cluster.generation.gpus_per_node=1",), AHEAD])
def test_separate_or_asynchronous_groups_do_not_sleep(overrides):
    assert set(record_calls(*SLEEPS, *overrides)) == {"update", "generate", "logprobs", "train"}


def test_policy_can_be_offloaded_on_cpu():
    events = record_calls("cluster.gpus_per_node=0", "policy.offload=true")
    assert events[:5] == ["offload but weights", "update", "offload", "generate", "logprobs"]


def test_offload_is_refused_with_rollouts_ahead():
    with pytest.raises(ConfigError, match=r"policy\.offload=true: with grpo\.max_trajectory_age=1"):
        build(*AHEAD, "policy.offload=true")


class SlowGeneration(FakeGeneration):
    """Blocks each call but the first until an in-flight weight update, or for `timeout_s`."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self.timeout_s = timeout_s
        self.changed = threading.Event()

    def update_weights(self, update, *, in_flight=False):
        if in_flight:
            self.changed.set()
        return super().update_weights(update, in_flight=in_flight)

    def generate(self, *args, **kwargs):
        if self.num_calls:
            self.changed.wait(self.timeout_s)
        return super().generate(*args, **kwargs)


@pytest.mark.parametrize(("enabled", "timeout_s"), [(False, 0.3), (True, 60.0)])
def test_in_flight_updates_are_opt_in(enabled, timeout_s):
    generation = SlowGeneration(timeout_s)
    quick = ("grpo.max_num_steps=3", "grpo.validation={at_start: false, at_end: false, period: 0}")
    build(*AHEAD, *quick, f"grpo.in_flight_weight_updates={enabled}", generation=generation).run()
    assert (generation.num_in_flight > 0) is enabled
