"""Tests rollouts ahead, and how policy and generation alternate on GPUs, with in-memory implementations."""

import threading

import pytest
from fake_grpo import FakeEnvironment, FakeGeneration, FakeLoader, FakePolicy, build, without_timings

from nemo_rl.errors import ConfigError, EnvironmentFailure

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
    assert job.run() == "the epoch is done"
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

        def train(self, batch, loss_fn, **options):
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
