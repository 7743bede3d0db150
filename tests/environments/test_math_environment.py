"""Tests the math environment with real verify processes. Tests that kill them find them as children of this process."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from processes import running

from nemo_rl.environments import verify_pool
from nemo_rl.environments.interfaces import EnvironmentReturn
from nemo_rl.environments.math_environment import MathEnvironment
from nemo_rl.environments.registry import environment_fqn
from nemo_rl.errors import ConfigError, EnvironmentFailure

TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def env() -> Iterator[MathEnvironment]:
    env = MathEnvironment({"num_workers": 2, "timeout_s": TIMEOUT_S, "answer_format": "whole"})
    yield env
    env.shutdown()


@pytest.fixture
def fresh_env() -> Iterator[MathEnvironment]:
    """Return an environment with an empty cache, whose processes may be killed. Its time-out is long."""
    env = MathEnvironment({"num_workers": 1, "timeout_s": 20.0, "answer_format": "whole"})
    yield env
    env.shutdown()


def score(env: MathEnvironment, pairs: list[tuple[str, object]]) -> EnvironmentReturn:
    return env.step([answer for answer, _ in pairs], [{"ground_truth": truth} for _, truth in pairs])


def test_a_prepared_environment_has_a_verify_process_for_the_first_step(fresh_env: MathEnvironment) -> None:
    before = verify_processes()
    fresh_env.prepare()
    [process] = [process for process in verify_processes() if process not in before]
    assert score(fresh_env, [("x + 1", "1 + x")]).rewards.tolist() == [1.0]
    fresh_env.prepare()
    assert [other for other in verify_processes() if other not in before] == [process]


def test_a_closed_environment_is_not_prepared(fresh_env: MathEnvironment) -> None:
    before = verify_processes()
    fresh_env.shutdown()
    fresh_env.prepare()
    assert verify_processes() == before


def verify_processes() -> list[psutil.Process]:
    return running("nemo_rl.environments.math_verifier", psutil.Process().children())


EQUAL = [
    (r"\frac12", "0.5"),
    (r"\frac{3}{6}", r"\frac{1}{2}"),
    (r"1\frac{1}{2}", "1.5"),
    (r"50\%", "0.5"),
    ("50%", "1/2"),
    ("50 percent", "50%"),
    (r"\{1,2,3\}", r"\{3,2,1\}"),
    ("1, 2, 3", r"\{3, 1, 2\}"),
    ("2 and 3", r"\{2,3\}"),
    (r"\pm 2", r"\{-2, 2\}"),
    ("(1,2)", "(1, 2)"),
    ("[0,1)", "[0, 1)"),
    (r"(-\infty, 3]", r"\left(-\infty,3\right]"),
    (r"(-\infty,-2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty,-2)"),
    (r"\mathbb{R}", r"(-\infty,\infty)"),
    (r"1.5\times 10^3", "1.5e3"),
    (r"1.5 \cdot 10^{3}", "1500"),
    ("1.5e3", r"15 \cdot 10^2"),
    ("2**10", "1024"),
    ("5 cm", "5"),
    (r"5\text{ m/s}", "5"),
    (r"\$5", "5"),
    (r"90^\circ", "90"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x=5", "5"),
    ("5", "x=5"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\log_2 8", "3"),
    ("10!", "3628800"),
    ("3 + 4i", "4i+3"),
    ("x>3", "3<x"),
    ("y=2x+1", "y=1+2x"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    (r"\text{Friday}", r"\text{friday}"),
    ("(A)", "A"),
    (r"\frac{\pi}{2}", r"0.5\pi"),
    ("12", 12),
    ("0.25", 0.25),
]
DIFFERENT = [
    (r"\frac{1}{3}", "0.5"),
    (r"50\%", "0.6"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "(0,1)"),
    (r"(-\infty, 3)", r"(-\infty, 3]"),
    (r"1.5\times 10^4", "1500"),
    ("x^2+2x", "(x+1)^2"),
    ("x>3", "x<3"),
    (r"\sqrt{7}", r"2\sqrt{2}"),
    ("B", "A"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\4&3\end{pmatrix}"),
    (r"\pi", "3.14"),
    # An answer with several values is not the right one.
    ("7 or 8", "7"),
    (r"7 \text{ or } 8", "8"),
    (r"\{7, 8\}", "7"),
    ("$7$ $8$", "8"),
    ("13", 12),
]
UNPARSEABLE = [
    "???",
    r"\frac{1}{",
    "1+" * 300,
    r"5} \boxed{7",
    r"\sqrt{" * 300 + "7" + "}" * 300,
    "\ud800",
    "\x00",
    "7}{",
]


def test_equivalent_answers_are_correct(env: MathEnvironment) -> None:
    result = score(env, list(EQUAL))
    wrong = [pair for pair, reward in zip(EQUAL, result.rewards, strict=True) if reward != 1.0]
    assert not wrong
    assert set(result.status) == {"ok"}
    assert result.terminated.all()


def test_other_answers_are_wrong(env: MathEnvironment) -> None:
    result = score(env, list(DIFFERENT))
    right = [pair for pair, reward in zip(DIFFERENT, result.rewards, strict=True) if reward != 0.0]
    assert not right
    assert set(result.status) == {"ok"}


def test_unparseable_answers_are_wrong_and_flagged(env: MathEnvironment) -> None:
    result = score(env, [*((text, "7") for text in UNPARSEABLE), ("", "7"), ("7" * 3000, "7")])
    assert not result.rewards.any()
    assert set(result.status) == {"unparseable"}
    assert result.answers[-2:] == [None, "7" * 3000]


@pytest.mark.parametrize("hostile", ["9^{9^{9^{9}}}", r"10^{10^{10}}!", "(" * 900 + "1" + ")" * 900])
def test_hostile_answer_times_out_alone(env: MathEnvironment, hostile: str) -> None:
    result = score(env, [(r"\sqrt{4}", "2"), (hostile, "5"), (r"\sqrt{9}", "3"), (r"\sqrt{9}", "4")])
    assert result.rewards.tolist() == [1, 0, 1, 0]
    assert result.status == ["ok", "timeout", "ok", "ok"]
    assert result.latency_s[1] >= TIMEOUT_S
    _, metrics = env.global_post_process_and_metrics(result)
    assert metrics["accuracy"] == 0.5
    assert metrics["fraction_timeout"] == 0.25
    assert metrics["fraction_unparseable"] == 0.0
    assert metrics["verify_latency_s"] == pytest.approx(result.latency_s.mean())


def test_huge_answers_do_not_reach_the_verifier(env: MathEnvironment) -> None:
    result = score(env, [("A" * 10_000_000, "A"), (r"\frac{" * 1_000_000, "5")])
    assert result.status == ["unparseable", "unparseable"]


def test_memory_is_bounded() -> None:
    def peak_mb(process: psutil.Process) -> float:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmPeak"))

    env = MathEnvironment({"memory_limit_mb": 128, "timeout_s": 60.0, "answer_format": "whole"})
    try:
        before = verify_processes()
        score(env, [(r"\sqrt{4}", "2")])
        (child,) = [process for process in verify_processes() if process not in before]
        base = peak_mb(child)
        result = score(env, [(r"\lfloor 2^{2^{33}} \rfloor + 1", "5"), (r"\sqrt{4}", "2")])  # takes 400 MB unbounded
        assert result.rewards.tolist() == [0.0, 1.0]
        assert base + 64 < peak_mb(child) <= base + 130
    finally:
        env.shutdown()


def test_no_code_is_run(env: MathEnvironment, tmp_path: Path) -> None:
    target = tmp_path / "created"
    score(env, [(f"__import__('os').system('touch {target}')", "5"), (f"\\input{{|touch {target}}}", "5")])
    assert not target.exists()


def test_verify_process_inherits_no_secret(fresh_env: MathEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    before = verify_processes()
    score(fresh_env, [(r"\sqrt{4}", "2")])
    (child,) = [process for process in verify_processes() if process not in before]
    assert "WANDB_API_KEY" not in child.environ()


@pytest.mark.parametrize("truth", [r"\frac{1}{", "", None, True, ["5"], "x" * 3000, "9^{9^{9^{9}}}"])
def test_broken_ground_truth_is_always_a_failure(env: MathEnvironment, truth: object) -> None:
    for answer in ("5", "", str(truth)):
        with pytest.raises(EnvironmentFailure, match=r"ground.truth"):
            score(env, [("5", "5"), (answer, truth)])


def test_missing_metadata_is_a_failure(env: MathEnvironment) -> None:
    with pytest.raises(EnvironmentFailure, match="it has the keys: answer"):
        env.step(["5"], [{"answer": "5"}])
    with pytest.raises(EnvironmentFailure, match="2 completions"):
        env.step(["5", "6"], [{"ground_truth": "5"}])


def test_large_batch_keeps_its_order(env: MathEnvironment) -> None:
    pairs: list[tuple[str, object]] = [(rf"\sqrt{{{n * n}}}", str(n if n % 3 else n + 1)) for n in range(1, 101)]
    result = score(env, pairs)
    assert result.rewards.tolist() == [float(n % 3 != 0) for n in range(1, 101)]
    assert result.answers == [answer for answer, _ in pairs]


def test_concurrent_steps_do_not_mix(env: MathEnvironment) -> None:
    def one(n: int) -> list[float]:
        return score(env, [(rf"\sqrt{{{n * n}}}+{k}", str(n + k * (k % 2))) for k in range(6)]).rewards.tolist()

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(one, range(200, 216))) == [[1, 1, 0, 1, 0, 1]] * 16


def test_plain_numbers_start_no_process(fresh_env: MathEnvironment) -> None:
    before = verify_processes()
    result = score(fresh_env, [("12", "12"), ("13", "12"), ("", "12")])
    assert result.rewards.tolist() == [1, 0, 0]
    assert verify_processes() == before


def test_equal_requests_are_verified_once(env: MathEnvironment) -> None:
    hostile = "9^{9^{9^{8}}}"
    result = score(env, [(hostile, "5")] * 20)
    assert result.status == ["timeout"] * 20
    again = score(env, [(hostile, "5")])
    assert again.status == ["timeout"]
    assert again.latency_s[0] < TIMEOUT_S  # cached: a new verification takes at least the time-out


def test_killed_idle_process_is_replaced(fresh_env: MathEnvironment) -> None:
    before = verify_processes()
    score(fresh_env, [(r"\sqrt{4}", "2")])
    (child,) = [process for process in verify_processes() if process not in before]
    child.kill()
    child.wait()
    assert score(fresh_env, [(r"\sqrt{9}", "3")]).rewards.tolist() == [1.0]


@contextlib.contextmanager
def send_signal_to_new(sign: signal.Signals, limit: int) -> Iterator[set[int]]:
    """Send `sign` to the first `limit` new verify processes when they compute; yields the ids of those processes."""
    known = {process.pid for process in verify_processes()}
    hit: set[int] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            for child in verify_processes():
                if child.pid in known | hit or len(hit) >= limit:
                    continue
                with contextlib.suppress(psutil.NoSuchProcess):
                    ready = child.rlimit(psutil.RLIMIT_CPU)[0] != psutil.RLIM_INFINITY
                    if ready:  # it has received a request
                        child.send_signal(sign)
                        hit.add(child.pid)

    with ThreadPoolExecutor(1) as executor:
        watching = executor.submit(watch)
        try:
            yield hit
        finally:
            stop.set()
        watching.result()  # raises the watcher's error


SLOW = (r"\int e^{e^{x^x}} dx", "5")


def test_request_of_a_killed_process_is_retried(fresh_env: MathEnvironment) -> None:
    with send_signal_to_new(signal.SIGKILL, limit=1) as hit:
        result = score(fresh_env, [SLOW])
    assert len(hit) == 1
    assert result.status == ["ok"]


def test_answer_that_crashes_two_processes_is_wrong(fresh_env: MathEnvironment) -> None:
    with send_signal_to_new(signal.SIGSEGV, limit=10) as hit:
        result = score(fresh_env, [SLOW])
    assert len(hit) == 2
    assert result.status == ["unparseable"]
    assert score(fresh_env, [(r"\sqrt{9}", "3")]).rewards.tolist() == [1.0]


@pytest.mark.slow  # starts many verify processes
def test_repeatedly_killed_processes_are_a_failure(fresh_env: MathEnvironment) -> None:
    with (
        send_signal_to_new(signal.SIGKILL, limit=10) as hit,
        pytest.raises(EnvironmentFailure, match="memory_limit_mb"),
    ):
        score(fresh_env, [SLOW])
    assert len(hit) == 3
    assert score(fresh_env, [(r"\sqrt{9}", "3")]).rewards.tolist() == [1.0]


def test_verifier_that_does_not_start_is_a_failure(
    fresh_env: MathEnvironment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'No module named math_verify' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(verify_pool.sys, "executable", str(broken))
    with pytest.raises(EnvironmentFailure, match=r"exit status 1.*No module named math_verify"):
        score(fresh_env, [(r"\sqrt{4}", "2")])


@pytest.mark.slow  # waits for a starved process
def test_starved_process_is_a_failure(fresh_env: MathEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_pool, "_STARVATION_FACTOR", 0.1)
    with send_signal_to_new(signal.SIGSTOP, limit=10) as hit, pytest.raises(EnvironmentFailure, match="overloaded"):
        score(fresh_env, [SLOW])
    assert len(hit) == 3


def test_process_is_replaced_after_its_last_request(
    fresh_env: MathEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_pool, "_MAX_REQUESTS_PER_PROCESS", 2)
    before = verify_processes()
    assert score(fresh_env, [(rf"\sqrt{{{n * n}}}", str(n)) for n in range(2, 7)]).rewards.all()
    children = [process for process in verify_processes() if process not in before]
    assert len(children) == 1


def test_shutdown_leaves_no_process(fresh_env: MathEnvironment) -> None:
    before = verify_processes()
    score(fresh_env, [(r"\sqrt{4}", "2")])
    assert len(verify_processes()) == len(before) + 1
    fresh_env.shutdown()
    fresh_env.shutdown()
    assert verify_processes() == before
    with pytest.raises(EnvironmentFailure, match="shut down"):
        score(fresh_env, [(r"\sqrt{4}", "2")])


def test_empty_batch(env: MathEnvironment) -> None:
    result = env.step([], [])
    assert result.size == 0
    assert env.global_post_process_and_metrics(result)[1] == {}


def test_wrong_config_names_the_key() -> None:
    with pytest.raises(ConfigError, match="num_worker"):
        MathEnvironment({"num_worker": 2})


@pytest.mark.slow  # starts Ray for one test
def test_as_a_ray_actor() -> None:
    import ray

    from nemo_rl.distributed.cluster.session import start_local_ray

    module, _, name = environment_fqn("math").rpartition(".")
    cls = getattr(__import__(module, fromlist=[name]), name)
    start_local_ray(num_cpus=2)
    try:
        actor = ray.remote(cls).options(num_cpus=0, max_concurrency=4).remote({"timeout_s": TIMEOUT_S})
        calls = [
            actor.step.remote(
                [rf"\boxed{{\sqrt{{{n * n}}}}}", r"\boxed{9^{9^{9^9}}}", "?"], [{"ground_truth": str(n)}] * 3
            )
            for n in range(2, 6)
        ]
        for result in ray.get(calls):
            assert result.rewards.tolist() == [1.0, 0.0, 0.0]
            assert result.rewards.dtype == np.float32
            assert result.status == ["ok", "timeout", "unparseable"]
        with pytest.raises(EnvironmentFailure, match=r"\\frac"):
            ray.get(actor.step.remote([r"\boxed{1}"], [{"ground_truth": r"\frac{1}{"}]))
        ray.get(actor.shutdown.remote())
    finally:
        ray.shutdown()


@pytest.mark.parametrize("answer", [r"\sqrt{4}", "9^{9^{9^{9}}}"])
def test_verify_process_ends_with_its_parent(answer: str) -> None:
    code = f"""
import os, signal, threading, time, psutil
from nemo_rl.environments.math_environment import MathEnvironment
env = MathEnvironment({{"timeout_s": 1.0, "answer_format": "whole"}})
step = threading.Thread(target=env.step, args=([{answer!r}], [{{"ground_truth": "x^2"}}]))
step.start()
while step.is_alive():  # the first answer may be done before its process has computed for so long
    if (children := psutil.Process().children()) and children[0].cpu_times().user >= 0.3:
        break
    time.sleep(0.01)
print(psutil.Process().children()[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    with contextlib.suppress(psutil.NoSuchProcess):
        # Its input has ended. If it computes, the kernel kills it after 4 s of CPU time.
        psutil.Process(int(done.stdout)).wait(timeout=400)
