"""The training loop of direct preference optimization, with a torch policy worker in this process."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rl.algorithms.dpo import DPO, check_reference_model
from nemo_rl.algorithms.dpo_config import DPOJobConfig
from nemo_rl.algorithms.reference_logprobs import ReferenceLogprobs
from nemo_rl.data.conversation_encoder import ConversationEncoder
from nemo_rl.data.preference_batches import TokenizedPairs, collate_pairs
from nemo_rl.data.preferences import load_preferences
from nemo_rl.data.tokenized_examples import ExampleLoader
from nemo_rl.errors import CheckpointError, ConfigError
from nemo_rl.models.embedded import make_model, make_tokenizer
from nemo_rl.models.policy.config import EmbeddedModelConfig, PolicyConfig
from nemo_rl.models.policy.torch_policy_worker import TorchPolicyWorker
from nemo_rl.utils.checkpoint import Checkpoint, CheckpointStore
from nemo_rl.utils.config import load_config

TOKENIZER = make_tokenizer("embedded-chat")
COLLATE = partial(collate_pairs, pad_token_id=TOKENIZER.pad_token_id)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(EmbeddedModelConfig(hidden_size=32, num_layers=1), TOKENIZER).save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return directory


@dataclass
class Records:
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        skip = ("timing/", "perf/")
        self.metrics.append((step, {name: value for name, value in metrics.items() if not name.startswith(skip)}))

    def of(self, name: str) -> list[float]:
        return [metrics[name] for _, metrics in self.metrics if name in metrics]


def job(*overrides: str) -> DPOJobConfig:
    defaults = ["dpo.num_records_per_step=4", "dpo.validation.period=2", "checkpointing.save_period=1"]
    return load_config(DPOJobConfig, None, [*defaults, *overrides])


def loop(config: DPOJobConfig, model: Path, directory: Path, digest: str = "reference") -> DPO:
    policy = PolicyConfig(
        model_name=str(model), num_threads=1, max_sequence_length=64, optimizer={"lr": 1e-2}, lora=config.policy.lora
    )
    worker: Any = TorchPolicyWorker(policy, total_steps=20, seed=3, device_type="cpu", weight_transport="local")
    encoder = ConversationEncoder(TOKENIZER, config.data)
    data = config.data.model_copy(update={"train": config.data.train.model_copy(update={"max_num_records": 12})})
    train, validation = (TokenizedPairs(dataset, encoder, 64) for dataset in load_preferences(data) if dataset)
    return DPO(
        config=config,
        policy=worker,
        loader=ExampleLoader(train, COLLATE, seed=config.dpo.seed, num_epochs=config.dpo.max_num_epochs),
        validation=COLLATE(validation[:5], pair_multiple=2),
        recorder=Records(),
        checkpoints=CheckpointStore(directory / "checkpoints", config.checkpointing),
        references={
            "train": ReferenceLogprobs(directory / "train.safetensors", f"{digest} {train.digest}", train, COLLATE),
            "validation": ReferenceLogprobs(directory / "validation.safetensors", digest, validation, COLLATE),
        },
        reference_model=digest,
    )


def latest(dpo: DPO) -> Checkpoint:
    assert dpo.checkpoints is not None
    checkpoint = dpo.checkpoints.latest()
    assert checkpoint is not None
    return checkpoint


def refused(*unused: object) -> torch.Tensor:
    raise AssertionError("the reference policy was asked again")


def weights(dpo: DPO) -> dict[str, torch.Tensor]:
    worker: Any = dpo.policy
    return {name: tensor.clone() for name, tensor in worker._model.full_tensors()}


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> DPO:
    dpo = loop(job("dpo.max_num_epochs=2"), model, tmp_path_factory.mktemp("run"))
    assert dpo.run() == "all 2 epochs are done"
    return dpo


def test_training_prefers_the_chosen_answers(trained: DPO) -> None:
    records = trained.recorder
    assert [step for step, metrics in records.metrics if "train/loss" in metrics] == [1, 2, 3, 4, 5, 6]
    assert [step for step, metrics in records.metrics if "val/loss" in metrics] == [0, 2, 4, 6]
    # The policy is its own reference before the first step.
    assert records.of("val/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert records.of("train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert records.of("train/reward_margin")[-1] > 0.1
    assert records.of("train/reward_accuracy")[-1] == 1.0
    assert records.of("val/loss")[-1] < math.log(2)
    assert records.of("val/chosen_logprob")[0] < records.of("val/chosen_logprob")[-1] < 0
    assert latest(trained).metrics["val/reward_margin"] > 0


@pytest.mark.parametrize("killed_after", [1, 4])
def test_resumed_run_equals_an_uninterrupted_run(
    trained: DPO, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    config = job("dpo.max_num_epochs=2")
    first = loop(config, model, tmp_path)
    save = first.checkpoints.save  # type: ignore[union-attr]

    def save_and_die(step: int, *args: Any) -> Checkpoint:
        checkpoint = save(step, *args)
        if step == killed_after:
            raise KeyboardInterrupt
        return checkpoint

    monkeypatch.setattr(first.checkpoints, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = loop(config, model, tmp_path)
    second.resume(latest(second))
    monkeypatch.setattr(second.policy, "get_reference_policy_logprobs", refused)
    assert second.run() == "all 2 epochs are done"
    assert all(torch.equal(value, weights(trained)[name]) for name, value in weights(second).items())
    is_step = [entry for entry in trained.recorder.metrics if "train/loss" in entry[1]]
    assert [entry for entry in second.recorder.metrics if "train/loss" in entry[1]] == is_step[killed_after:]


def test_lost_reference_file_is_computed_again_with_the_initial_weights(
    trained: DPO, model: Path, tmp_path: Path
) -> None:
    first = loop(job("dpo.max_num_epochs=2", "dpo.max_num_steps=3"), model, tmp_path)
    first.run()
    (tmp_path / "train.safetensors").unlink()
    second = loop(job("dpo.max_num_epochs=2"), model, tmp_path)
    second.resume(latest(second))
    second.run()
    values, expected = (dpo.references["train"]._values for dpo in (second, trained))
    assert torch.allclose(values, expected, atol=1e-5)
    assert second.recorder.of("train/loss")[-1] == pytest.approx(trained.recorder.of("train/loss")[-1], abs=1e-5)


def test_only_answers_that_are_trained_on_are_computed(model: Path, tmp_path: Path) -> None:
    dpo = loop(job("dpo.max_num_steps=2"), model, tmp_path)
    dpo.run()
    assert (~dpo.references["train"]._values.isnan()).all(1).sum() == 8
    longer = loop(job("dpo.max_num_steps=3"), model, tmp_path)
    longer.resume(latest(longer))
    longer.run()
    assert not longer.references["train"]._values.isnan().any()


def test_reference_is_the_base_model_under_lora(model: Path, tmp_path: Path) -> None:
    dpo = loop(job("policy.lora.rank=4", "dpo.max_num_epochs=2"), model, tmp_path)
    dpo.run()
    assert dpo.recorder.of("train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert dpo.recorder.of("train/reward_margin")[-1] > 0


def flipped(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize("damage", [None, flipped], ids=["other digest", "damaged"])
def test_file_that_does_not_fit_is_not_used(
    trained: DPO, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None] | None
) -> None:
    path = tmp_path / "train.safetensors"
    original = trained.references["train"]
    path.write_bytes(original._path.read_bytes())
    if damage is not None:
        damage(path)
    digest = original._digest if damage else "other"
    loaded = ReferenceLogprobs(path, digest, original._pairs, COLLATE)
    assert loaded._values.isnan().all()
    assert "is written again" in caplog.text
    kept = ReferenceLogprobs(original._path, original._digest, original._pairs, COLLATE)
    assert torch.equal(kept._values, original._values)


def test_checkpoint_of_another_reference_policy_is_refused(trained: DPO) -> None:
    check_reference_model(latest(trained), "reference")
    with pytest.raises(CheckpointError, match=r"trained with another reference policy: the weights of policy.model_na"):
        check_reference_model(latest(trained), "other")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dpo.label_smoothing=0.1", "dpo.loss=ipo"], "label_smoothing has no meaning with loss=ipo; set it to 0"),
        (["dpo.beta=0"], "dpo.beta"),
        (["policy.train_micro_batch_size=3"], r"train_micro_batch_size \(3\) counts conversations and must be a multi"),
        (
            ["policy.train_global_batch_size=2", "cluster.cpu_workers_per_node=2"],
            r"2 conversations \(1 pairs\) per",
        ),
        (["policy.train_global_batch_size=3"], r"dpo.num_records_per_step x 2 \(8\) is not a multiple of"),
        (["policy.batching.mode=dynamic", "policy.batching.max_tokens=200"], "is less than a pair of sequences of"),
        (["cluster.generation.num_nodes=1"], "cluster.generation has no use in direct preference optimization"),
        (["sft.seed=1"], "unknown key sft"),
    ],
)
def test_invalid_configuration_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(*overrides)
