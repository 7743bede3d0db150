"""`nemo_rl.utils.futures`."""

import threading

import pytest

from nemo_rl.utils.futures import completed, run_in_thread


def test_completed_future_holds_its_value() -> None:
    assert completed(3).done()
    assert completed(3).result() == 3


def test_run_in_thread_returns_the_result() -> None:
    assert run_in_thread(lambda: threading.current_thread().name, "worker").result() == "worker"


def test_run_in_thread_does_not_keep_the_process_alive() -> None:
    assert run_in_thread(lambda: threading.current_thread().daemon, "worker").result()


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(2)])
def test_run_in_thread_keeps_every_exception(error: BaseException) -> None:
    def fail() -> None:
        raise error

    assert run_in_thread(fail, "failing").exception() is error


def test_a_running_call_cannot_be_cancelled() -> None:
    release = threading.Event()
    future = run_in_thread(release.wait, "waiting")
    assert not future.cancel()
    release.set()
    assert future.result()
