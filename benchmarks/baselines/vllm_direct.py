"""Runs vLLM's own `LLM` on given prompts. Prints tokens/s and seconds until ready as JSON on the last line.

It runs with the interpreter of the VLLM_CPU venv and does not use this repository::

    <venv>/bin/python benchmarks/baselines/vllm_direct.py '{"model": ...}'

Its settings make vLLM fast here: the engine in this process, weights packed for oneDNN (vLLM's default), prompts as
tokens, no detokenization, output only for finished completions, no seed per request, and waiting threads that sleep.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

STARTED = time.perf_counter()
SETTINGS = json.loads(sys.argv[1])
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS=str(SETTINGS["num_threads"]),
    OMP_WAIT_POLICY="PASSIVE",  # the same as in our workers
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)

import torch  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402


def main() -> None:
    torch.set_num_threads(SETTINGS["num_threads"])
    num_prompts, num_generations = SETTINGS["num_prompts"], SETTINGS["num_generations"]
    rows = num_prompts * num_generations
    llm = LLM(
        model=SETTINGS["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=SETTINGS["prompt_length"] + SETTINGS["max_new_tokens"],
        max_num_seqs=rows,
        max_num_batched_tokens=max(8192, rows),
        enforce_eager=True,
        kv_cache_memory_bytes=int(SETTINGS["kv_cache_gib"] * 2**30),
        disable_log_stats=True,
    )
    ready_s = time.perf_counter() - STARTED
    params = SamplingParams(
        temperature=1.0,
        max_tokens=SETTINGS["max_new_tokens"],
        ignore_eos=True,
        logprobs=0 if SETTINGS["logprobs"] else None,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    prompts = [
        {"prompt_token_ids": [4 + (7 * prompt + 3 * position) % 90 for position in range(SETTINGS["prompt_length"])]}
        for prompt in range(num_prompts)
        for _ in range(num_generations)
    ]
    rates = []
    for _ in range(SETTINGS["num_warmup_rounds"] + SETTINGS["num_rounds"]):
        llm.reset_prefix_cache()
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        spent = time.perf_counter() - began
        rates.append(sum(len(output.outputs[0].token_ids) for output in outputs) / spent)
    print(json.dumps({"tokens_per_s": statistics.median(rates[SETTINGS["num_warmup_rounds"] :]), "ready_s": ready_s}))


main()
