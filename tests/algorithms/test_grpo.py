"""Tests the GRPO loop with in-memory implementations of its interfaces."""

import threading

import pytest
import torch
from fake_grpo import FakeEnvironment, FakeGeneration, FakeLoader, FakePolicy, build, without_timings
from ray.exceptions import RayTaskError

from nemo_rl.algorithms.loss_recipes import LOSS_RECIPES
from nemo_rl.errors import CheckpointError, ConfigError, EnvironmentFailure, LogprobMismatchError, WeightSyncError


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
    assert job.run() == "the epoch is done"
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


@pytest.mark.parametrize(("override", "expected"), [("temperature=0.5", False), ("top_p=0.9", True), ("top_k=5", True)])
def test_sampling_logprobs_are_sent_only_with_truncation(override: str, expected: bool):
    job = build("grpo.max_num_steps=1", f"policy.generation.{override}")
    job.run()
    assert ("sampling_logprobs" in job.policy.batches[0]) is expected


def test_reference_logprobs_are_computed_only_with_a_kl_term():
    for coefficient, expected in (("0", False), ("0.1", True)):
        job = build("grpo.max_num_steps=1", f"loss.kl_coef={coefficient}")
        job.run()
        assert ("reference_policy_logprobs" in job.policy.batches[0]) is expected


ONE_STEP = ("grpo.max_num_steps=1", "grpo.validation.at_start=false", "grpo.validation.at_end=false")
TWO_STEPS = (*ONE_STEP, "grpo.max_num_steps=2")
PLAIN = ("grpo.advantage.baseline=none", "grpo.advantage.normalize_std=false")


def test_kl_to_go_gives_an_advantage_to_each_token():
    job = build(*TWO_STEPS, *PLAIN, "loss.kl_coef=0.1", "loss.kl_estimator=k1", "loss.kl_placement=reward_to_go")
    job.run()
    _, batch = job.policy.batches  # at the first step, the policy is the reference
    # log pi - log pi_ref is -1 for both tokens of every completion.
    expected = torch.tensor([0.0, 0.2, 0.1]) + batch["rewards"][:, None] * torch.tensor([0.0, 1.0, 1.0])
    torch.testing.assert_close(batch["advantages"], expected)
    assert "prev_logprobs" in batch


def test_kl_in_the_reward_counts_once_per_completion():
    job = build(*TWO_STEPS, *PLAIN, "loss.kl_coef=0.1", "loss.kl_estimator=k1", "loss.kl_placement=reward")
    job.run()
    _, batch = job.policy.batches  # at the first step, the policy is the reference
    torch.testing.assert_close(batch["advantages"], batch["rewards"] + 0.2)


def test_overlong_penalty_shapes_advantages_and_not_the_reported_reward():
    lengths = ("policy.generation.max_new_tokens=2", "grpo.overlong_penalty.factor=0.5")
    job = build(*ONE_STEP, *PLAIN, *lengths)
    job.run()
    (batch,) = job.policy.batches
    torch.testing.assert_close(batch["advantages"], batch["rewards"] - 0.5)  # all completions are at the limit
    assert job.recorder.metrics[0]["train/reward"] == pytest.approx(float(batch["rewards"].mean()))


@pytest.mark.parametrize("recipe", LOSS_RECIPES)
def test_every_recipe_trains(recipe):
    job = build(*ONE_STEP, f"loss={recipe}")
    assert job.run() == "all 1 steps are done"
    assert job.policy.batches[0]["advantages"].isfinite().all()


class ScoringPolicy(FakePolicy):
    """Records who scores the samples of each step. A subclass checks the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.scored_by: list[str] = []

    def get_logprobs(self, batch):
        self.scored_by.append("policy")
        return super().get_logprobs(batch)

    def get_reference_policy_logprobs(self, batch):
        self.scored_by.append("reference")
        return super().get_reference_policy_logprobs(batch)


def test_the_policy_is_its_own_reference_until_it_has_trained():
    job = build(*TWO_STEPS, "loss.kl_coef=0.1", policy=ScoringPolicy())
    job.run()
    assert job.policy.scored_by == ["policy", "reference"]
    first, second = job.policy.batches
    assert torch.equal(first["reference_policy_logprobs"], first["generation_logprobs"])
    assert torch.equal(second["reference_policy_logprobs"], torch.zeros_like(second["generation_logprobs"]))


def test_the_policy_scores_samples_while_they_are_graded():
    is_scored = threading.Event()

    class Policy(ScoringPolicy):
        def get_reference_policy_logprobs(self, batch):
            assert "rewards" not in batch
            is_scored.set()
            return super().get_reference_policy_logprobs(batch)

    class Environment(FakeEnvironment):
        def step(self, completions, metadata):
            if job.step == 1:
                assert is_scored.wait(60), "grading ends only after the policy has scored the samples"
            return super().step(completions, metadata)

    job = build(*TWO_STEPS, "loss.kl_coef=0.1", policy=Policy(), environment=Environment())
    job.run()
    assert job.policy.scored_by == ["policy", "reference"]
    assert job.recorder.metrics[0]["timing/logprobs_s"] > 0


@pytest.mark.parametrize("options", [("grpo.dynamic_sampling.enabled=true",), ("grpo.max_trajectory_age=1",)])
def test_samples_that_are_not_final_or_of_another_thread_are_scored_later(options):
    class Policy(ScoringPolicy):
        def get_reference_policy_logprobs(self, batch):
            assert "rewards" in batch
            assert threading.current_thread() is threading.main_thread()
            return super().get_reference_policy_logprobs(batch)

    job = build("loss.kl_coef=0.1", *options, policy=Policy())
    job.run()
    assert job.policy.scored_by.count("reference") == 5
