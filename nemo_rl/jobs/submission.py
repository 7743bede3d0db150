"""Jobs on a running cluster, over Ray's job server: what `nemo-rl submit`, `status`, `logs` and `stop` do.

::

    sources ── zip of its files ─────┐
    py_modules ──────────────────────┼──► job server (HTTP, the head's dashboard port) ──► driver process on the head
    command, --env, --secret ────────┘         │
                                               └──► its output, followed until it ends; its exit code

Ray's job server keeps a job's command and its runtime_env, and shows them to everybody who may ask it. So values of
secrets never travel: `Secret` says where the head finds one, and the head's shell puts it into the job's environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl import settings
from nemo_rl.errors import ConfigError, SubmissionError
from nemo_rl.secrets import is_secret_key, mask_secrets
from nemo_rl.utils.source_archive import SourceTree, collect, unpack_zip, write_zip

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# What Ray fetches by itself on every node.
REMOTE_SCHEMES = ("https", "s3", "gs", "azure", "abfss", "file", "gcs", "image_uri")
FINAL = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
INTERRUPTED = 130

_NAME = re.compile(r"[A-Za-z_]\w*")
_JOB_ID = re.compile(r"[A-Za-z0-9_.-]+")  # it becomes a part of the job server's URLs
_RAISED = re.compile(r"^[\w.]*(?:Error|Exception): (.+)$", re.MULTILINE)
_MAX_RECONNECTS = 10
_RECONNECT_PAUSE_S = 1.0


@dataclass(frozen=True)
class Secret:
    """A variable whose value the head knows: from a file there (`path`), or from the head's own environment."""

    name: str
    path: str | None = None

    @staticmethod
    def parse(text: str) -> Secret:
        """`NAME` or `NAME=FILE`. Raises `ConfigError`."""
        name, _, path = text.partition("=")
        if not _NAME.fullmatch(name) or ("=" in text and not path.startswith("/")):
            raise ConfigError(f"--secret {text.partition('=')[0]}: expected NAME or NAME=/absolute/path/on/the/head.")
        return Secret(name, path or None)

    def shell(self) -> str:
        """A command that puts the variable into the environment, or fails with a sentence that says what is missing."""
        if self.path is None:
            why = f"not set where the Ray head runs; set it there, or submit with --secret {self.name}=FILE"
            return f': "${{{self.name}:?{why}}}"'
        return f'{self.name}="$(cat {shlex.quote(self.path)})" && export {self.name}'


@dataclass(frozen=True)
class Submission:
    """A job to be.

    Attributes:
        command: words of the command, run in the working directory on the head.
        working_dir: a local directory or a remote URI; None for none.
        py_modules: local directories, `.py` files, wheels, zips, or remote URIs.
        excludes: patterns as in `.gitignore`.
        include_untracked: also upload new files that are no Python, unless git ignores them.
        env: variables of the job. Names that look secret are refused.
        secrets: variables whose values the head knows.
        name: the job's id; made from the command when empty.
    """

    command: Sequence[str]
    working_dir: str | None = None
    py_modules: Sequence[str] = ()
    excludes: Sequence[str] = ()
    include_untracked: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Sequence[Secret] = ()
    name: str = ""

    def check(self) -> None:
        """Raise `ConfigError` for what must not, or cannot, be sent."""
        if not self.command:
            raise ConfigError("say what to run after `--`: nemo-rl submit -- python examples/run_grpo_math.py")
        if self.name and not _JOB_ID.fullmatch(self.name):
            raise ConfigError(f"--name {self.name!r}: expected letters, digits and any of '_.-'.")
        for option, paths in (("--working-dir", [self.working_dir or ""]), ("--py-module", self.py_modules)):
            for path in paths:
                if "://" in path and not is_remote(path):
                    raise ConfigError(f"{option} {path}: Ray fetches from {', '.join(REMOTE_SCHEMES)} only.")
        shown = [name for name in self.env if settings.is_secret(name)]
        shown += [key for key, _, value in _assignments(self.command) if value and is_secret_key(key)]
        if shown:
            raise ConfigError(
                f"the value of {', '.join(shown)} would be kept by the job server and shown to everybody who asks it. "
                "Give it by reference: --secret NAME (a variable of the Ray head) or --secret NAME=FILE (a file there)."
            )

    @property
    def entrypoint(self) -> str:
        """The shell command that the head runs."""
        return " && ".join([*(secret.shell() for secret in self.secrets), f"exec {shlex.join(self.command)}"])


@dataclass(frozen=True)
class JobState:
    """A job as the server knows it. `exit_code` is None until its command has ended by itself."""

    job_id: str
    status: str
    message: str
    entrypoint: str
    started: float | None
    ended: float | None
    exit_code: int | None

    @property
    def is_final(self) -> bool:
        """Whether it has ended."""
        return self.status in FINAL

    @property
    def code(self) -> int:
        """What a command that waited for the job ends with: the job's own exit code, as a shell would say it."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED":
            return INTERRUPTED
        if self.exit_code is None or self.exit_code == 0:
            return 1
        return 128 - self.exit_code if self.exit_code < 0 else self.exit_code


def parse_env(assignments: Sequence[str]) -> dict[str, str]:
    """`K=V` words as a mapping. Raises `ConfigError`."""
    found = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise ConfigError(f"--env {name}: expected NAME=VALUE.")
        found[name] = value
    return found


def is_remote(path: str) -> bool:
    """Whether Ray fetches `path` by itself."""
    return path.partition("://")[0] in REMOTE_SCHEMES if "://" in path else False


@contextlib.contextmanager
def prepared(submission: Submission) -> Iterator[Upload]:
    """Collect what is uploaded. Its files are there while the block runs."""
    submission.check()
    with tempfile.TemporaryDirectory(prefix="nemo_rl-submit-") as folder:
        yield _upload(submission, Path(folder))


@dataclass(frozen=True)
class Upload:
    """What goes to the cluster.

    Attributes:
        trees: local directories, by what they are for.
        runtime_env: for Ray; local paths in it are ready to be uploaded.
        metadata: for the job's record: commit and name of the sources.
    """

    trees: dict[str, SourceTree]
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    extra_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Of all local files, before compression."""
        return sum(tree.num_bytes for tree in self.trees.values()) + self.extra_bytes

    def check_size(self, limit: int) -> None:
        """Raise `ConfigError` that names the largest files when it is more than `limit` bytes."""
        if self.num_bytes <= limit:
            return
        files = [(file.num_bytes, file.path) for tree in self.trees.values() for file in tree.largest(5)]
        largest = ", ".join(f"{path} ({size / 1e6:.1f} MB)" for size, path in sorted(files, reverse=True)[:5])
        raise ConfigError(
            f"{self.num_bytes / 1e6:.1f} MB would be uploaded; the limit is {limit / 1e6:.1f} MB. Largest: {largest}. "
            "Leave files out with --exclude PATTERN, put them where the cluster can read them, or raise --max-size."
        )


def _upload(submission: Submission, folder: Path) -> Upload:
    runtime_env: dict[str, Any] = {"env_vars": dict(submission.env)} if submission.env else {}
    trees: dict[str, SourceTree] = {}
    metadata: dict[str, str] = {}
    if submission.working_dir is not None and is_remote(submission.working_dir):
        runtime_env["working_dir"] = submission.working_dir
    elif submission.working_dir is not None:
        tree = collect(
            Path(submission.working_dir), submission.excludes, include_untracked=submission.include_untracked
        )
        trees["working_dir"] = tree
        write_zip(tree, folder / "sources.zip")
        runtime_env["working_dir"] = str(folder / "sources.zip")
        if tree.commit is not None:
            metadata["commit"] = tree.commit
    extra = 0
    for index, module in enumerate(submission.py_modules):
        path, size = _py_module(module, folder / str(index), submission, trees)
        runtime_env.setdefault("py_modules", []).append(path)
        extra += size
    return Upload(trees, runtime_env, metadata, extra)


def _py_module(module: str, folder: Path, submission: Submission, trees: dict[str, SourceTree]) -> tuple[str, int]:
    """What to hand to Ray for one entry of py_modules, and the bytes of it that no tree counts."""
    if is_remote(module):
        return module, 0
    path = Path(module).absolute()
    if path.suffix == ".zip" and path.is_file():
        unpack_zip(path, folder)
        inside = sorted(folder.iterdir())
        if len(inside) != 1 or not inside[0].is_dir():
            names = ", ".join(entry.name for entry in inside[:5]) or "nothing"
            raise ConfigError(f"--py-module {module}: expected one package directory inside, found {names}.")
        return str(inside[0]), path.stat().st_size
    if path.is_file() and path.suffix in (".whl", ".py"):
        return str(path), path.stat().st_size
    if not path.is_dir():
        raise ConfigError(f"--py-module {module}: expected a directory, a .py file, a wheel, a zip or a remote URI.")
    tree = collect(path, submission.excludes, include_untracked=submission.include_untracked)
    trees[f"py_module {path.name}"] = tree
    folder.mkdir()
    write_zip(tree, folder / "module.zip")
    unpack_zip(folder / "module.zip", folder / path.name)
    return str(folder / path.name), 0


def _assignments(words: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            yield name.lstrip("-").replace(".", "_").replace("-", "_"), equals, value


class JobServer:
    """Ray's job server at `address` (`http://host:port`). Raises `SubmissionError` for what it answers."""

    def __init__(self, address: str | None = None) -> None:
        self.address = address or settings.RAY_API_SERVER_ADDRESS.get() or DEFAULT_ADDRESS
        if not self.address.startswith(("http://", "https://")):
            raise ConfigError(
                f"{self.address!r} is not the address of a job server: expected http://host:port, where port is that "
                "of Ray's dashboard (8265)."
            )
        from ray.job_submission import JobSubmissionClient

        from nemo_rl.distributed.ray_private import hide_upload_notices

        hide_upload_notices()
        # Ray lets the variable win over the address that it is given.
        with self._explained(), settings.exported({settings.RAY_API_SERVER_ADDRESS.name: self.address}):
            self._client: JobSubmissionClient = JobSubmissionClient(self.address)

    def submit(self, submission: Submission, upload: Upload) -> str:
        """Upload and start; return the job's id. What the cluster already has is not sent again."""
        job_id = submission.name or _new_id(submission.command)
        with self._explained(submitting=job_id):
            return self._client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=job_id,
                runtime_env=upload.runtime_env,
                metadata=upload.metadata,
            )

    def state(self, job_id: str) -> JobState:
        """One job."""
        with self._explained(job_id):
            return _state(self._client.get_job_info(job_id))

    def jobs(self) -> list[JobState]:
        """All submitted jobs, the newest first."""
        with self._explained():
            found = [_state(job) for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.started or 0.0, reverse=True)

    def logs(self, job_id: str) -> str:
        """Everything that the job has written so far."""
        with self._explained(job_id):
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str, on_text: Callable[[str], None]) -> JobState:
        """Pass on what the job writes until it has ended; survives lost connections without a gap or a repetition."""
        taken = failures = 0
        while True:
            lost: BaseException | None = None
            try:
                taken = asyncio.run(self._tail(job_id, taken, on_text))
            except _TailBroken as broken:
                failures = 0 if broken.taken > taken else failures + 1
                taken, lost = broken.taken, broken.__cause__
            try:
                state = self.state(job_id)
                rest = self.logs(job_id)[taken:] if state.is_final else ""
            except SubmissionError as error:  # as long as the server is away, so is what it says of the job
                failures, lost = failures + (lost is None), error
            else:
                if rest:
                    on_text(rest)
                if state.is_final:
                    return state
            if failures > _MAX_RECONNECTS:
                raise SubmissionError(
                    f"the log of {job_id} cannot be followed: {lost} The job may go on: nemo-rl status {job_id}"
                ) from lost
            time.sleep(_RECONNECT_PAUSE_S)

    async def _tail(self, job_id: str, taken: int, on_text: Callable[[str], None]) -> int:
        """Follow until the server closes; return the number of characters of the log that have been passed on."""
        seen = 0
        texts = aiter(self._client.tail_job_logs(job_id))
        while True:
            try:
                text = await anext(texts)
            except StopAsyncIteration:
                return taken
            except (TimeoutError, OSError, RuntimeError) as error:
                raise _TailBroken(taken) from error
            fresh = text[max(0, taken - seen) :]
            seen += len(text)
            if fresh:
                on_text(fresh)  # what this raises (nobody reads any more, a full disk) is no lost connection
                taken = max(taken, seen)

    def stop(self, job_id: str) -> bool:
        """Ask the job to end; false when it had ended already."""
        with self._explained(job_id):
            return self._client.stop_job(job_id)

    @contextlib.contextmanager
    def _explained(self, job_id: str = "", *, submitting: str = "") -> Iterator[None]:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise SubmissionError(
                f"the job server at {self.address} refuses this user: {str(error).partition(chr(10))[0]} "
                "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token."
            ) from None
        except (ConnectionError, requests.RequestException) as error:
            raise SubmissionError(
                f"no Ray job server answers at {self.address}. Give its address with --address, or open a tunnel: "
                f"ssh -L 8265:127.0.0.1:8265 HEAD. ({str(error).partition(chr(10))[0]})"
            ) from None
        except (RuntimeError, ValueError) as error:
            text = mask_secrets(str(error))
            if "No available agent" in text:
                text += (
                    " Ray's agent on the head is not up. Its port (52365) may belong to another cluster there: "
                    "see dashboard_agent.log, and start the head with --dashboard-agent-listen-port."
                )
            if job_id and "does not exist" in text:
                raise ConfigError(f"there is no job {job_id!r} at {self.address}. See: nemo-rl status") from None
            if "already exists" in text and submitting:
                raise ConfigError(f"there is a job {submitting!r} at {self.address}: choose another --name.") from None
            if "Traceback" in text and (raised := _RAISED.findall(text)):
                text = raised[-1]  # the server's own traceback helps nobody
            raise SubmissionError(f"the job server at {self.address} answered: {text.strip()[-800:]}") from None


class _TailBroken(Exception):
    def __init__(self, taken: int) -> None:
        super().__init__(taken)
        self.taken = taken


def _state(job: JobDetails) -> JobState:
    return JobState(
        job_id=job.submission_id or "",
        status=str(job.status.value),
        message=mask_secrets(job.message or ""),
        entrypoint=mask_secrets(job.entrypoint or ""),
        started=job.start_time / 1000 if job.start_time else None,
        ended=job.end_time / 1000 if job.end_time else None,
        exit_code=job.driver_exit_code,
    )


def _new_id(command: Sequence[str]) -> str:
    scripts = [os.path.basename(word) for word in command if word.endswith(".py")] or [os.path.basename(command[0])]
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", scripts[0].removesuffix(".py"))[:40]
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
