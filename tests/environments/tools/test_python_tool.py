"""The tool `python` on real processes: results, limits, and what the code cannot do."""

from __future__ import annotations

import os
import platform
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemo_rl.environments.tools import sandbox
from nemo_rl.environments.tools.python_tool import PythonTool
from nemo_rl.errors import ConfigError, EnvironmentFailure

LANDLOCK = sandbox.landlock_version() >= 1
needs_landlock = pytest.mark.skipif(not LANDLOCK, reason="this kernel has no Landlock")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs code, and check that nothing is left in the temporary directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield PythonTool(timeout_s=100.0, protect_files=LANDLOCK).python
    assert list(tmp_path.iterdir()) == []


def run_briefly(code: str) -> str:
    return PythonTool(timeout_s=1.0, protect_files=LANDLOCK).python(code)


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print(sum(range(5)))", "10\n"),
        ("print('é')", "é\n"),
        ("print(__name__)", "__main__\n"),
        ("", ""),
        ("import sys; sys.stderr.write('warning')", "warning"),
        ("import os; print('x'); os._exit(0)", "x\n"),
        ("import sys; print(sys.stdin.read())", "\n"),
        ("open('a', 'w').write('hi'); print(open('a').read())", "hi\n"),
        ("import tempfile; print(tempfile.TemporaryFile().write(b'abc'))", "3\n"),
        ("import asyncio\nasync def f(): print(5)\nasyncio.run(f())", "5\n"),
        ("import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)", "True\n"),
        ("import numpy; print(int(numpy.ones((9, 9)).dot(numpy.ones(9)).sum()))", "81\n"),
        ("raise SystemExit", ""),
    ],
)
def test_output(run, code: str, output: str) -> None:
    assert run(code) == output


def test_traceback_shows_the_line_of_the_code(run) -> None:
    output = run("print('before')\n1 / 0")
    assert output.startswith("before\nTraceback (most recent call last):\n")
    assert 'File "code.py", line 2, in <module>\n    1 / 0\n' in output
    assert output.endswith("ZeroDivisionError: division by zero\n")
    assert "sandbox" not in output


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(: pass", "SyntaxError: invalid syntax"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import os; os._exit(3)", "Error: exit status 3"),
        ("import ctypes; ctypes.string_at(0)", "Error: the process crashed (SIGSEGV)"),
        ("while True: print('x' * 999)", "Error: stopped after 65536 bytes of output"),
        ("x = bytearray(2**40)", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(2**20))", "MemoryError"),
        ("with open('a', 'wb') as f: f.write(bytes(2**25))", "File too large"),
    ],
)
def test_model_reads_why_the_code_ended(run, code: str, message: str) -> None:
    assert message in run(code)


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("import time\nprint('x')\ntime.sleep(999)", "x\nError: stopped after 3 s"),
        ("import os, time\nos.close(1); os.close(2); time.sleep(999)", "Error: stopped after 3 s"),
    ],
)
def test_code_that_sleeps_is_stopped(code: str, output: str) -> None:
    assert run_briefly(code) == output


@pytest.mark.parametrize("first", ["", "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"])
def test_code_that_computes_forever_is_stopped(first: str) -> None:
    """By its CPU limit, which it cannot ignore, or on a busy machine by the clock."""
    output = run_briefly(f"{first}while True: pass")
    assert output in ("Error: stopped after 1 s of CPU time", "Error: stopped after 3 s")


def test_code_cannot_raise_its_limits(run) -> None:
    output = run("import resource; resource.setrlimit(resource.RLIMIT_CPU, (9999, 9999))")
    assert "not allowed to raise maximum limit" in output


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.fork()",
        "while True: __import__('os').fork()",
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing as m; m.Process(target=print).start()",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import threading; threading.Thread(target=print).start()",
        "import socket; socket.socket()",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "import os, signal; os.kill(os.getppid(), 0)",
        "import os; os.kill(-1, 0)",
        "import os; os.pidfd_open(os.getppid())",
        "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 9)",
        "import os; os.sched_setaffinity(os.getppid(), {0})",
        "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU)",
        "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
        "import os; os.memfd_create('x')",
        "import os; os.chmod('.', 0o777)",
        "import os; os.utime('.')",
    ],
)
def test_denied(run, code: str) -> None:
    output = run(code)
    assert "Operation not permitted" in output or "can't start new thread" in output, output


@needs_landlock
@pytest.mark.parametrize(
    "code",
    [
        "print(open('/etc/passwd').read())",
        "import os; print(os.listdir('/'))",
        "import os; print(open(f'/proc/{os.getppid()}/environ').read())",
        "import os; open(f'/proc/{os.getppid()}/mem', 'r+b')",
        "open('/proc/self/environ')",
        "import os; os.listdir('..')",
        "open('../escaped', 'w')",
        "open(VICTIM)",
        "open(VICTIM, 'r+b')",
        "import os; os.unlink(VICTIM)",
        "import os; os.truncate(VICTIM, 0)",
        "import os; os.rename(VICTIM, 'a')",
        "import os; os.link(VICTIM, 'a')",
        "import os; os.mkdir('/dev/shm/x')",
        "import os; os.symlink('/etc/passwd', 'a'); open('a')",
        "import os; os.mknod('a', 0o020600, os.makedev(1, 1)); open('a')",
    ],
)
def test_files_outside_are_denied(run, code: str, tmp_path_factory) -> None:
    victim = tmp_path_factory.mktemp("outside") / "victim"
    victim.write_text("x")
    output = run(f"VICTIM = {str(victim)!r}\n{code}")
    assert re.search("Permission denied|Operation not permitted|Invalid cross-device link", output), output
    assert victim.read_text() == "x"


def test_network_is_denied_and_the_port_gets_no_connection(run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        output = run(f"import urllib.request as r; r.urlopen('http://127.0.0.1:{port}', timeout=5)")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert "Operation not permitted" in output


def test_code_inherits_no_variables_and_no_state(run, monkeypatch) -> None:
    monkeypatch.setenv("MY_SECRET", "hunter2")
    assert (
        run("import os; print(sorted(n for n in os.environ if 'THREADS' not in n))") == "['HOME', 'LANG', 'TMPDIR']\n"
    )
    run("import builtins; builtins.x = 1; open('a', 'w')")
    assert run("import os; print(hasattr(__builtins__, 'x'), os.listdir())") == "False []\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities")
def test_root_has_no_capabilities(run) -> None:
    assert "Operation not permitted" in run("import os; os.setuid(1)")
    assert "Operation not permitted" in run("import os; os.chroot('.')")


def test_code_that_cannot_be_encoded_is_run(run) -> None:
    assert run("print('a\ud800')") == "a?\n"


def test_concurrent_calls_do_not_mix(run) -> None:
    with ThreadPoolExecutor(8) as threads:
        outputs = list(threads.map(run, [f"print({index})" for index in range(24)]))
    assert outputs == [f"{index}\n" for index in range(24)]


def test_process_ends_with_its_parent(tmp_path) -> None:
    """A worker that is killed leaves no process behind."""
    program = (
        "from nemo_rl.environments.tools.python_tool import PythonTool\n"
        f"PythonTool(timeout_s=600, protect_files={LANDLOCK}).python('import time; time.sleep(600)')"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(sandbox.__file__).parents[3])}
    parent = subprocess.Popen([sys.executable, "-c", program], env=env)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    child = Path("/proc/none")
    while not child.exists() or not re.search(r"^Seccomp:\s+2$", (child / "status").read_text(), re.MULTILINE):
        assert parent.poll() is None
        pids = children.read_text().split()
        child = Path(f"/proc/{pids[0]}") if pids else child
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while child.exists() and "State:\tZ" not in (child / "status").read_text():
        pass


def test_sandbox_that_cannot_be_made_is_a_failure(monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(EnvironmentFailure, match="cannot start /nonexistent/python"):
        PythonTool().python("print(1)")


WITHOUT_LANDLOCK = """
import ctypes, struct
from nemo_rl.environments.tools.python_tool import PythonTool
from nemo_rl.errors import ConfigError
libc = ctypes.CDLL(None)
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 444), (0x06, 0, 0, 0x00050026), (0x06, 0, 0, 0x7FFF0000)]  # 444: ENOSYS
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)), 0, 0) == 0
try:
    PythonTool()
except ConfigError as error:
    print(error)
print(PythonTool(protect_files=False).python("print(open('/etc/passwd').read() > ''); open('a', 'w'); import socket"))
print(PythonTool(protect_files=False).python("import socket; socket.socket()"))
"""


def test_kernel_without_landlock_is_refused_unless_configured() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(sandbox.__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LANDLOCK], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "has no Landlock" in done.stdout
    assert "set protect_files to false" in done.stdout
    assert "\nTrue\n" in done.stdout
    assert "Operation not permitted" in done.stdout


def test_descriptors_above_1023_are_waited_for(run) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip(f"this process may open only {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    null = os.open(os.devnull, os.O_RDONLY)
    held = [os.dup(null) for _ in range(1100)]
    try:
        assert run("print(1)") == "1\n"
    finally:
        for descriptor in (null, *held):
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"memory_limit_mb": -1}, {"file_limit_mb": 0}])
def test_limit_that_is_not_positive_is_refused(options) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        PythonTool(**options)


HEADERS = {
    0: Path(f"/usr/include/{platform.machine()}-linux-gnu/asm/unistd_64.h"),
    1: Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("column", [0, 1])
def test_numbers_of_system_calls_are_those_of_the_kernel(column: int) -> None:
    if not HEADERS[column].is_file():
        pytest.skip(f"{HEADERS[column]} is not installed")
    text = HEADERS[column].read_text()
    known = {name: int(number) for name, number in re.findall(r"define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    newer = {"fchmodat2", "setxattrat", "removexattrat", "file_setattr"}  # than the headers of some distributions
    for name, numbers in sandbox.DENIED.items():
        if name in known or name not in newer:
            assert numbers[column] == known.get(name), name
    names = ("prlimit64", "socketpair", "fcntl", "ioctl")
    assert [pair[column] for pair, *_ in sandbox.CONDITIONAL] == [known[name] for name in names]
