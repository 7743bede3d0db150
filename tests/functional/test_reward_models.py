"""A job whose rewards come from a reward model and from a judge."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from grpo_jobs import ROOT, metrics, run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.append(str(Path(__file__).parent.parent / "environments"))
from judge_server import Answer, JudgeServer, completion, refusal

from nemo_rl.models.embedded import ensure_embedded_model
from nemo_rl.models.policy.config import EMBEDDED_CHAT_MODEL, EmbeddedModelConfig
from nemo_rl.observability.rollout_files import open_rollouts, read_rollouts

KEY = "key-of-the-judge-8141"


@pytest.mark.slow  # starts a job
def test_job_with_a_reward_model_and_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewards are exactly the scores; a busy or confused judge is asked again; the key is in no file."""
    monkeypatch.setenv("NEMO_RL_PY_EXECUTABLES_SYSTEM", "1")  # this Python has the client of the judge
    monkeypatch.setenv("JUDGE_KEY", KEY)
    model, directory = tmp_path / "reward_model", tmp_path / "run"
    embedded = ensure_embedded_model(EmbeddedModelConfig(), EMBEDDED_CHAT_MODEL)
    AutoModelForSequenceClassification.from_pretrained(embedded, num_labels=1).save_pretrained(model)
    AutoTokenizer.from_pretrained(embedded).save_pretrained(model)
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"problem": f"{n}*11", "answer": str(11 * n)}) + "\n" for n in range(8)))

    def answer(request: dict[str, Any]) -> Answer:
        """Score an answer by its length. One of five requests is refused, one of four seeds makes no sense."""
        if len(server.requests) % 5 == 0:
            return refusal(503)
        if request["seed"] % 4 == 3:
            return completion("I cannot decide.")
        problem, reference, text = request["messages"][0]["content"].split("|", 2)
        assert reference == str(11 * int(problem.removesuffix("*11")))
        return completion(f"Score: {len(text)}")

    server = JudgeServer(answer)
    try:
        job = run(
            "--config",
            str(ROOT / "examples" / "configs" / "grpo_reward_model.yaml"),
            f"env.product.config.model={model}",
            "env.length.class=judge",
            f"env.length.config.base_url={server.url}",
            "env.length.config.model=judge",
            "env.length.config.api_key_variable=JUDGE_KEY",
            "env.length.config.template='{problem}|{reference}|{answer}'",
            r"env.length.config.pattern='Score: (\d+)'",
            "env.length.config.score_range=[0, 100]",
            "env.length.config.scale=0.01",
            "env.length.max_turns=1",
            f"env.length.data.train.path={problems}",
            "grpo.max_num_steps=2",
            "grpo.num_prompts_per_step=4",
            "grpo.num_generations_per_prompt=4",
            "grpo.validation.max_num_problems=8",
            f"logger.log_dir={directory}",
        )
    finally:
        server.close()
    assert job.returncode == 0, job.stderr[-3000:]
    assert set(server.authorizations) == {f"Bearer {KEY}"}
    columns = ("environment", "outcome", "reward", "messages")
    records = list(read_rollouts(list(open_rollouts(directory).values()), columns))
    judged = [record for record in records if record["environment"] == "length"]
    scored = [record for record in records if record["environment"] == "product"]
    assert (len(judged), len(scored)) == (16, 16)
    assert {record["outcome"] for record in records} == {"trained"}
    for record in judged:
        prompt, action, verdict = record["messages"]
        assert [prompt["role"], action["role"], verdict["role"]] == ["user", "assistant", "judge"]
        assert verdict["content"] == f"Score: {len(action['content'].strip())}"
        assert record["reward"] == pytest.approx(0.01 * len(action["content"].strip()))
    assert len({record["reward"] for record in scored}) > 1
    last = [record for record in metrics(directory) if "train/reward" in record][-1]
    assert last["train/env_length/asks"] >= 1.0
    assert last["train/env_failed"] == 0.0
    assert 0.0 <= last["train/env_product/environment_reward"] <= 1.0
    assert KEY not in job.stdout + job.stderr
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
