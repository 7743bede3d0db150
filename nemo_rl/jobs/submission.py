"""Describes a job for a running cluster and prepares its upload, for `nemo-rl submit`.

Ray's job server stores the command and the runtime_env of a job and shows them to all its users. The values of secrets
are therefore never sent. A `Secret` says where the head finds the value, and the head's shell exports it to the job.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_rl import settings
from nemo_rl.errors import ConfigError
from nemo_rl.secrets import has_credentials, is_secret_variable, secret_words
from nemo_rl.utils.source_archive import SourceTree, collect, unpack_zip, write_zip

# Ray downloads these on every node.
REMOTE_SCHEMES = ("https", "s3", "gs", "azure", "abfss", "file", "gcs", "image_uri")

# The directory, which does not exist, of the paths by which venvs name uploaded projects.
UPLOADED_ROOT = "/uploaded"

_NAME = re.compile(r"[A-Za-z_]\w*")
_JOB_ID = re.compile(r"[A-Za-z0-9_.-]+")  # part of the job server's URLs


@dataclass(frozen=True)
class Secret:
    """References the value of a variable on the head: a file (`path`), or the environment of the Ray head.

    Example:
        >>> Secret.parse("HF_TOKEN=/run/secrets/hf_token")
        Secret(name='HF_TOKEN', path='/run/secrets/hf_token')
    """

    name: str
    path: str | None = None

    @staticmethod
    def parse(text: str) -> Secret:
        """Parse `NAME` or `NAME=FILE`. Raises `ConfigError`."""
        name, _, path = text.partition("=")
        if not _NAME.fullmatch(name) or ("=" in text and not path.startswith("/")):
            raise ConfigError(f"--secret {text.partition('=')[0]}: expected NAME or NAME=/absolute/path/on/the/head.")
        return Secret(name, path or None)

    def shell(self) -> str:
        """Return a shell command that exports the variable, or fails with a message if the value is missing."""
        if self.path is None:
            why = f"not set in the environment of the Ray head; set it there, or use --secret {self.name}=FILE"
            return f': "${{{self.name}:?{why}}}"'
        return f'{self.name}="$(cat {shlex.quote(self.path)})" && export {self.name}'


@dataclass(frozen=True)
class Submission:
    """Describes a job to submit.

    Example::

        submission = Submission(["python", "examples/run_grpo_math.py"], working_dir=".")
        with prepared(submission) as upload:
            job_id = JobServer("http://127.0.0.1:8265").submit(submission, upload)

    Attributes:
        command: words of the command. It runs in the working directory on the head.
        working_dir: a local directory or a remote URI; None uploads no directory.
        py_modules: local directories, `.py` files, wheels, zip archives, or remote URIs.
        excludes: patterns in the syntax of `.gitignore`.
        include_untracked: also upload untracked files that are not Python and that git does not ignore.
        env: variables of the job. Names that look secret and values with credentials are refused.
        secrets: variables whose values are on the head.
        name: the job's id; derived from the command if empty.
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
        """Raise `ConfigError` if the submission is invalid or contains the value of a secret."""
        if not self.command:
            raise ConfigError("no command. Give it after `--`: nemo-rl submit -- python examples/run_grpo_math.py")
        if self.name and not _JOB_ID.fullmatch(self.name):
            raise ConfigError(f"--name {self.name!r}: expected letters, digits and any of '_.-'.")
        visible = [name for name, value in self.env.items() if is_secret_variable(name, value)]
        visible += secret_words(self.command)
        visible += ["the credentials in --working-dir"] if has_credentials(self.working_dir or "") else []
        visible += ["the credentials in --py-module" for path in self.py_modules if has_credentials(path)][:1]
        if visible:
            raise ConfigError(
                f"the value of {', '.join(visible)} would be kept by the job server, which shows it to all its users. "
                "Use a reference: --secret NAME (a variable of the head) or --secret NAME=FILE (a file on the head). "
                "A URI that Ray downloads must need no credentials: use a local path, or the nodes' own access."
            )
        for option, paths in (("--working-dir", [self.working_dir or ""]), ("--py-module", self.py_modules)):
            for path in paths:
                if "://" in path and not is_remote(path):
                    raise ConfigError(f"{option} {path}: Ray downloads only from {', '.join(REMOTE_SCHEMES)}.")

    @property
    def entrypoint(self) -> str:
        """Shell command that the head runs, in the uploaded directory."""
        project = [self._project_shell()] if self.working_dir is not None else []
        secrets = [secret.shell() for secret in self.secrets]
        return " && ".join([*project, *secrets, f"exec {shlex.join(self.command)}"])

    def _project_shell(self) -> str:
        """Return a shell command that makes the uploaded directory the project of the job, if it is a project.

        The cluster may have another `NEMO_RL_PROJECT_ROOT`. Each upload has another path. Venvs therefore name the
        project by a path that does not change with the upload, so that edited code needs no new venv, and their
        directory outlives the upload.
        """
        exports = []
        if settings.PROJECT_ROOT.name not in self.env:
            exports.append(f'export {settings.PROJECT_ROOT.name}="$PWD"')
            name = _project_name(self.working_dir or "")
            if name is not None and settings.SOURCES.name not in self.env:
                exports.append(f'export {settings.SOURCES.name}="{{\\"{UPLOADED_ROOT}/{name}\\": \\"$PWD\\"}}"')
        cache = f"${{{settings.CACHE_DIR.name}:-$HOME/.cache/nemo_rl}}"
        exports.append(f'export {settings.VENV_DIR.name}="${{{settings.VENV_DIR.name}:-{cache}/venvs}}"')
        return f"if [ -f pyproject.toml ]; then {'; '.join(exports)}; fi"


def _project_name(working_dir: str) -> str | None:
    """Return the name of the project in a local directory, in letters, digits and '-'; None if it is no project."""
    try:
        pyproject = tomllib.loads(Path(working_dir, "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = pyproject.get("project", {}).get("name") or Path(working_dir).absolute().name
    return re.sub(r"[^A-Za-z0-9]+", "-", str(name)).strip("-").lower() or "project"


def parse_env(assignments: Sequence[str]) -> dict[str, str]:
    """Parse `NAME=VALUE` words. Raises `ConfigError`.

    Example:
        >>> parse_env(["GREETING=hello", "LEVEL=3"])
        {'GREETING': 'hello', 'LEVEL': '3'}
    """
    variables = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise ConfigError(f"--env {name}: expected NAME=VALUE.")
        variables[name] = value
    return variables


def is_remote(path: str) -> bool:
    """Return whether `path` is a URI that Ray downloads."""
    return path.partition("://")[0] in REMOTE_SCHEMES if "://" in path else False


@contextlib.contextmanager
def prepared(submission: Submission) -> Iterator[Upload]:
    """Collect the files of a submission. They exist until the end of the block."""
    submission.check()
    with tempfile.TemporaryDirectory(prefix="nemo_rl-submit-") as folder:
        yield _upload(submission, Path(folder))


@dataclass(frozen=True)
class Upload:
    """Holds the files and the runtime_env of a submission.

    Attributes:
        trees: local directories, by purpose ("working_dir", "py_module NAME").
        runtime_env: Ray's runtime_env; its local paths are ready for upload.
        metadata: metadata of the job: the commit of the sources.
        extra_bytes: bytes of local files outside `trees`.
    """

    trees: dict[str, SourceTree]
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    extra_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all local files before compression."""
        return sum(tree.num_bytes for tree in self.trees.values()) + self.extra_bytes

    def check_size(self, limit: int) -> None:
        """Raise `ConfigError`, which names the largest files, if the upload exceeds `limit` bytes."""
        if self.num_bytes <= limit:
            return
        files = [(file.num_bytes, file.path) for tree in self.trees.values() for file in tree.largest(5)]
        largest = ", ".join(f"{path} ({size / 1e6:.1f} MB)" for size, path in sorted(files, reverse=True)[:5])
        raise ConfigError(
            f"{self.num_bytes / 1e6:.1f} MB would be uploaded; the limit is {limit / 1e6:.1f} MB. Largest: {largest}. "
            "Exclude files with --exclude PATTERN, store them on a disk of the cluster, or increase --max-size."
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
    """Prepare one entry of py_modules; return its path or URI for Ray, and its bytes outside `trees`."""
    if is_remote(module):
        return module, 0
    path = Path(module).absolute()
    if path.suffix == ".zip" and path.is_file():
        unpack_zip(path, folder)
        entries = sorted(folder.iterdir())
        if len(entries) != 1 or not entries[0].is_dir():
            names = ", ".join(entry.name for entry in entries[:5]) or "nothing"
            raise ConfigError(f"--py-module {module}: expected an archive of one package directory, found {names}.")
        return str(entries[0]), path.stat().st_size
    if path.is_file() and path.suffix in (".whl", ".py"):
        return str(path), path.stat().st_size
    if not path.is_dir():
        raise ConfigError(
            f"--py-module {module}: expected a directory, a .py file, a wheel, a zip archive or a remote URI."
        )
    tree = collect(path, submission.excludes, include_untracked=submission.include_untracked)
    trees[f"py_module {path.name}"] = tree
    folder.mkdir()
    write_zip(tree, folder / "module.zip")
    unpack_zip(folder / "module.zip", folder / path.name)
    return str(folder / path.name), 0
