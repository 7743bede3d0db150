"""Reward-model training as a user runs it: real processes, real Ray, real venvs, on the embedded chat model."""

import pytest
import torch
from grpo_jobs import ROOT, metrics, run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from nemo_rl.data.dialogues import CALCULATOR_SCHEMA, product_choice


@pytest.mark.slow  # starts a job
def test_reward_model_prefers_the_better_answers_of_held_out_pairs(tmp_path):
    directory = tmp_path / "run"
    done = run(
        "reward_model.num_records_per_step=16",
        "reward_model.validation.period=8",
        "reward_model.validation.max_num_records=64",
        "data.train.max_num_records=512",
        "cluster.cpu_workers_per_node=2",
        "policy.batching.mode=packed",
        "policy.batching.max_tokens=512",
        f"logger.log_dir={directory}",
        script=ROOT / "examples" / "run_reward_model.py",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    validations = [record for record in metrics(directory) if "val/loss" in record]
    assert validations[0]["val/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert validations[0]["val/reward_accuracy"] == 0.0  # all scores begin at 0
    assert validations[-1]["val/reward_accuracy"] > 0.9

    model = directory / "checkpoints" / "step_000032" / "policy" / "model"
    reward_model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(model),
        AutoTokenizer.from_pretrained(model),
    )
    prompt, *answers = product_choice(10**9 + 1)
    texts = [
        tokenizer.apply_chat_template([*prompt, answer], tools=[CALCULATOR_SCHEMA], tokenize=False)
        for answer in answers
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        good, bad = reward_model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits[:, 0].tolist()
    assert good > bad
