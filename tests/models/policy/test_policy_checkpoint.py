"""A resumed run continues bit for bit, and checkpoints move between layouts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import RankProcesses
from tiny_policy import advantage_loss, assert_equal, make_batch, make_llama, make_worker, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from nemo_rl.errors import CheckpointError
from nemo_rl.models.policy.process_group import capture_random_state, restore_random_state, seed_everything

State = dict[str, torch.Tensor]


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.normal()), float(torch.rand(()))]


def undisturbed(rank: int, world_size: int, model: Path, directory: Path, config: dict[str, Any]) -> tuple[State, Any]:
    """Train three steps, save a checkpoint, train three more."""
    shard = make_batch().chunk(rank, world_size)
    worker = make_worker(model, **config)
    for _ in range(3):
        worker.train(shard, advantage_loss)
    draws()  # caches a spare normal deviate, which belongs to the state
    worker.save_checkpoint(directory)
    drawn = draws()
    for _ in range(3):
        worker.train(shard, advantage_loss)
    return weights(worker), drawn


def resumed(rank: int, world_size: int, model: Path, directory: Path, config: dict[str, Any]) -> tuple[State, Any]:
    """Load the checkpoint in a new worker and train the last three steps."""
    shard = make_batch().chunk(rank, world_size)
    worker = make_worker(model, **config)
    worker.load_checkpoint(directory)
    drawn = draws()
    results = [worker.train(shard, advantage_loss) for _ in range(3)]
    assert results[0].metrics["lr"] < 1e-2, "the schedule did not continue after its warm-up"
    return weights(worker), drawn


def test_one_worker_resumes_bit_for_bit(llama: Path, tmp_path: Path) -> None:
    expected, drawn = undisturbed(0, 1, llama, tmp_path / "c", {})
    actual, drawn_again = resumed(0, 1, llama, tmp_path / "c", {})
    assert_equal(expected, actual)
    assert drawn == drawn_again


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_workers_resume_bit_for_bit(llama: Path, tmp_path: Path, two_ranks: RankProcesses, sharding: str) -> None:
    arguments = (2, llama, tmp_path / "c", {"sharding": sharding})
    first, second = two_ranks.run(undisturbed, *arguments), two_ranks.run(resumed, *arguments)
    for (expected, drawn), (actual, drawn_again) in zip(first, second, strict=True):
        assert_equal(expected, actual)
        assert drawn == drawn_again
    assert first[0][1] != first[1][1], "ranks must draw different numbers"


def train_and_save(rank: int, model: Path, directory: Path, config: dict[str, Any]) -> State:
    worker = make_worker(model, **config)
    for _ in range(2):
        worker.train(make_batch().chunk(rank, 2), advantage_loss)
    worker.get_logprobs(make_batch())  # leaves FSDP's outermost parameters gathered
    worker.save_checkpoint(directory)
    return weights(worker)


def load_and_describe(rank: int, model: Path, directory: Path, config: dict[str, Any]) -> State:
    worker = make_worker(model, **config)
    worker.get_logprobs(make_batch())
    worker.load_checkpoint(directory)
    return weights(worker)


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint_loads_under_every_sharding(
    llama: Path, tied_llama: Path, tmp_path: Path, two_ranks: RankProcesses, tied: bool
) -> None:
    model = tied_llama if tied else llama
    fsdp, ddp = {"sharding": "fsdp"}, {"sharding": "ddp"}
    saved, _ = two_ranks.run(train_and_save, model, tmp_path / "c", fsdp)
    assert_equal(saved, load_and_describe(0, model, tmp_path / "c", ddp))
    for config in (fsdp, ddp):
        for loaded in two_ranks.run(load_and_describe, model, tmp_path / "c", config):
            assert_equal(saved, loaded)
    saved, _ = two_ranks.run(train_and_save, model, tmp_path / "d", ddp)
    for loaded in two_ranks.run(load_and_describe, model, tmp_path / "d", fsdp):
        assert_equal(saved, loaded)


def test_transformers_loads_the_checkpoint(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model = make_llama(tmp_path / "model")
    words = {str(number): number for number in range(29)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "0")), pad_token="0").save_pretrained(model)
    worker = make_worker(model)
    worker.train(make_batch(), advantage_loss)
    worker.save_checkpoint(tmp_path / "c")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "c" / "model")
    assert loaded.dtype == torch.float32
    assert_equal(dict(loaded.named_parameters()), dict(worker._model.full_tensors()))
    assert AutoTokenizer.from_pretrained(tmp_path / "c" / "model").get_vocab() == words


def test_optimizer_state_is_split_into_files(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_rl.models.policy.policy_checkpoint.MAX_FILE_BYTES", 10_000)
    worker = make_worker(llama)
    worker.train(make_batch(), advantage_loss)
    worker.save_checkpoint(tmp_path)
    assert len(list(tmp_path.glob("optimizer-*.safetensors"))) > 3
    assert_equal(weights(worker), load_and_describe(0, llama, tmp_path, {}))


@pytest.fixture(scope="module")
def saved(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    make_worker(llama).save_checkpoint(directory)
    return directory


def copy_of(source: Path, target: Path) -> Path:
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("trainer.json", "trainer.json"),
        ("rng.safetensors", "rng.safetensors"),
        ("optimizer-00000.safetensors", "lacks 63 tensors"),
        ("model/config.json", r"config\.json"),
        ("model/model.safetensors", "model"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_checkpoint_changes_nothing(
    llama: Path, saved: Path, tmp_path: Path, file: str, message: str, damage: str
) -> None:
    directory = copy_of(saved, tmp_path / "c")
    if damage == "missing":
        (directory / file).unlink()
    else:
        (directory / file).write_bytes((directory / file).read_bytes()[:-10])
        message = "cannot load the checkpoint"
    worker = make_worker(llama)
    worker.train(make_batch(), advantage_loss)
    before = weights(worker)
    with pytest.raises(CheckpointError, match=message):
        worker.load_checkpoint(directory)
    assert_equal(before, weights(worker))


def test_checkpoint_of_another_model_is_refused(saved: Path, tied_llama: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"another model: lm_head\.weight has the shape \[29, 32\] in the checkpoint and none"
    ):
        make_worker(tied_llama).load_checkpoint(saved)


def test_checkpoint_of_another_format_is_refused(llama: Path, saved: Path, tmp_path: Path) -> None:
    directory = copy_of(saved, tmp_path / "c")
    trainer = json.loads((directory / "trainer.json").read_text())
    (directory / "trainer.json").write_text(json.dumps(trainer | {"format": 99}))
    with pytest.raises(CheckpointError, match=r"format 99.*format 1"):
        make_worker(llama).load_checkpoint(directory)


def test_unwritable_checkpoint_directory_raises(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*file"):
        make_worker(llama).save_checkpoint(tmp_path / "file" / "checkpoint")


def fail_to_load(rank: int, model: Path, directory: Path, config: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as error:
        make_worker(model, **config).load_checkpoint(directory)
    return str(error.value)


def test_failed_load_raises_on_all_ranks(llama: Path, tmp_path: Path, two_ranks: RankProcesses) -> None:
    first, second = two_ranks.run(fail_to_load, llama, tmp_path / "nowhere", {"sharding": "fsdp"})
    assert "trainer.json" in first
    assert "rank 0" in second


def test_random_states_are_restored() -> None:
    seed_everything(5, 0)
    first = draws()
    seed_everything(5, 0)
    assert draws() == first
    state = capture_random_state(torch.device("cpu"))
    second = draws()
    assert second != first
    restore_random_state(state, torch.device("cpu"))
    assert draws() == second
    seed_everything(5, 1)
    assert draws() != first


def test_cpu_worker_ignores_gpu_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """All GPUs of a node are visible to Ray workers without GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    state = capture_random_state(torch.device("cpu"))
    assert "cuda" not in state
    restore_random_state({**state, "cuda": torch.zeros(16, dtype=torch.uint8)}, torch.device("cpu"))
