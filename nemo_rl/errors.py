"""Exceptions that nemo_rl raises on purpose.

::

    NemoRLError                                     base of all
    ├── ConfigError (ValueError)                    a configuration key, value or override is wrong
    ├── DataError (ValueError)                      a data set is missing, empty or holds a broken record
    ├── VenvError                                   a Python environment cannot be described, built or used
    │   ├── InvalidPyExecutableError (ValueError)   a py_executable string is not accepted
    │   ├── RuntimeEnvError (ValueError)            a runtime_env field is unknown, malformed or clashes with another
    │   ├── LockMismatchError (ValueError)          uv.lock does not match pyproject.toml
    │   ├── UnknownExtraError (ValueError)          no such extra, dependency group or member
    │   ├── UvNotFoundError                         uv is not installed
    │   ├── VenvBuildError                          uv failed; carries command, node, output tail and log path
    │   │   ├── NoSpaceError                        the build ran out of disk space
    │   │   └── DamagedCacheError                   uv's cache holds altered or unreadable files of a package
    │   ├── VenvLockTimeoutError (TimeoutError)     another builder held the lock for too long
    │   ├── IncompatibleVenvError                   the venv's Python or ray version differs from the driver's
    │   ├── VenvDriftError                          the code asks for other packages than the existing venv holds
    │   ├── BundleError (ValueError)                a bundle for offline builds is unsafe, incomplete or does not fit
    │   └── BroadcastError                          a venv or source archive from another node is incomplete or changed
    ├── ClusterError                                the Ray cluster cannot serve a request
    │   ├── SubmissionError                         the job server cannot be reached or refuses a request
    │   ├── ResourceInsufficientError (ValueError)  the job needs more CPUs, GPUs or nodes than the cluster has
    │   └── NodeVenvError                           at least one node has no ready venv
    ├── WorkerError                                 a worker or worker group failed
    │   ├── UnregisteredActorError (ValueError)     the registry does not know the worker class
    │   ├── WorkerStartError                        a worker died or did not answer while it was starting
    │   │   └── NodeLostError                       a worker cannot start: its node has left the cluster
    │   ├── AttestationError                        a worker runs in another venv, Python or ray than it should
    │   └── CallCancelledError                      a call was cancelled before its workers returned a result
    ├── ModelError                                  a model cannot be loaded, or a request does not fit it
    ├── WeightSyncError                             policy and generation workers hold different weights
    ├── EnvironmentFailure                          an RL environment failed to grade a sample
    ├── TrainingError                               training must stop
    │   ├── LogprobMismatchError                    generation and policy log-probabilities differ too much
    │   └── NonFiniteError                          a loss or gradient norm is NaN or infinite
    ├── CheckpointError                             a checkpoint cannot be written, read or trusted
    └── PipelineError                               a data pipeline cannot run, or one of its stages failed
        ├── PipelineDefinitionError (ValueError)    the stages, names, needs or options of a pipeline are inconsistent
        ├── ResumeError (ValueError)                a run directory belongs to another pipeline or is in use
        └── StageError                              a stage failed; carries stage, task and traceback
            ├── StageStartError                     a stage's worker could not start or set up
            ├── StageInputError (ValueError)        a task lacks an attribute or column that the stage needs
            └── StageOutputError (ValueError)       a stage returned something that is not a task

A message says what failed, the value seen and how to fix it. Users' mistakes also derive from `ValueError`, so code
that does not know this package can catch them.
"""

from __future__ import annotations

from collections.abc import Iterator


class NemoRLError(Exception):
    """Base class of every error that nemo_rl raises on purpose."""


class ConfigError(NemoRLError, ValueError):
    """A configuration key, value or override is wrong."""


class DataError(NemoRLError, ValueError):
    """Data is missing, malformed, cannot be read or written, or does not divide into batches. For a broken record the
    message names file and line."""


class VenvError(NemoRLError):
    """A Python environment cannot be described, built or used."""


class InvalidPyExecutableError(VenvError, ValueError):
    """A `py_executable` is neither the path of an interpreter nor an accepted `uv run ...` string."""


class RuntimeEnvError(VenvError, ValueError):
    """A `runtime_env` field is unknown, malformed or clashes with another."""


class LockMismatchError(VenvError, ValueError):
    """`uv.lock` does not match `pyproject.toml`."""


class UnknownExtraError(VenvError, ValueError):
    """A spec names an extra, a dependency group or a workspace member that the project does not have."""


class UvNotFoundError(VenvError):
    """The `uv` executable cannot be found."""


class VenvBuildError(VenvError):
    """uv failed to build a venv.

    Attributes:
        node: host name of the node where the build ran.
        command: the uv command, with secrets masked.
        output_tail: the last lines of uv's own output.
        log_path: the file that holds the full output; empty if there is none.
    """

    def __init__(
        self, message: str, *, node: str = "", command: str = "", output_tail: str = "", log_path: str = ""
    ) -> None:
        super().__init__(message)
        self.node = node
        self.command = command
        self.output_tail = output_tail
        self.log_path = log_path

    def __reduce__(self) -> tuple[object, ...]:
        # Ray pickles errors between processes. By default pickle drops the keyword-only fields.
        return (_rebuild_build_error, (type(self), self.args[0], self.__dict__.copy()))


def _rebuild_build_error(cls: type[VenvBuildError], message: str, fields: dict[str, str]) -> VenvBuildError:
    error = cls(message)
    error.__dict__.update(fields)
    return error


class NoSpaceError(VenvBuildError):
    """A build ran out of disk space."""


class DamagedCacheError(VenvBuildError):
    """uv's cache is damaged: it holds files that differ from their package's RECORD, or that uv cannot read."""


class VenvLockTimeoutError(VenvError, TimeoutError):
    """Another process held the build lock of a venv for longer than the timeout."""


class IncompatibleVenvError(VenvError):
    """The Python or ray version of a venv differs from the driver's."""


class VenvDriftError(VenvError):
    """The code asks for other packages than the existing venv holds, and `NEMO_RL_VENV_DRIFT` is `refuse`."""


class BundleError(VenvError, ValueError):
    """A bundle for offline builds is unsafe to unpack, incomplete or made for another platform or lock."""


class BroadcastError(VenvError):
    """A venv or source archive from another node did not arrive, or its content changed on the way."""


class ClusterError(NemoRLError):
    """The Ray cluster cannot serve a request."""


class SubmissionError(ClusterError):
    """Ray's job server cannot be reached, or refuses a request."""


class ResourceInsufficientError(ClusterError, ValueError):
    """The cluster has fewer CPUs, GPUs or nodes than the job asks for."""


class NodeVenvError(ClusterError):
    """At least one node failed to make a venv ready."""


class WorkerError(NemoRLError):
    """A worker or a worker group failed."""


class UnregisteredActorError(WorkerError, ValueError):
    """The registry does not know the name of a worker class."""


class WorkerStartError(WorkerError):
    """A worker died or did not answer while it was starting."""


class NodeLostError(WorkerStartError):
    """A worker cannot start or restart because its node has left the Ray cluster."""


class AttestationError(WorkerError):
    """A worker runs in another venv, Python or ray version than the one planned for it."""


class CallCancelledError(WorkerError):
    """A call was cancelled, with `RayWorkerGroup.cancel` or Ctrl-C, before its workers returned a result."""


class ModelError(NemoRLError):
    """A model cannot be loaded, or a request does not fit it."""


class WeightSyncError(NemoRLError):
    """A weight transfer failed, or policy and generation workers hold different weights."""


class EnvironmentFailure(NemoRLError):
    """An RL environment failed to grade a sample. The failure never becomes a reward."""


class TrainingError(NemoRLError):
    """Training must stop."""


class LogprobMismatchError(TrainingError):
    """Log-probabilities from generation and from the policy differ by more than the configured bound."""


class NonFiniteError(TrainingError):
    """A loss or gradient norm is NaN or infinite."""


class CheckpointError(NemoRLError):
    """A checkpoint cannot be written, read or trusted."""


class PipelineError(NemoRLError):
    """A data pipeline cannot run, or one of its stages failed."""


class PipelineDefinitionError(PipelineError, ValueError):
    """The stages, names, needs or options of a pipeline are inconsistent. Nothing has been started."""


class ResumeError(PipelineError, ValueError):
    """A run directory belongs to another pipeline or other inputs, or a live run uses it."""


class StageError(PipelineError):
    """A stage of a pipeline failed.

    Attributes:
        stage: name of the stage.
        task_id: id of the task that failed; empty if the error does not concern a single task.
        traceback_text: traceback in the stage's process; empty if there is none.
    """

    def __init__(self, message: str, *, stage: str = "", task_id: str = "", traceback_text: str = "") -> None:
        super().__init__(message)
        self.stage = stage
        self.task_id = task_id
        self.traceback_text = traceback_text

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_stage_error, (type(self), self.args[0], self.__dict__.copy()))


def _rebuild_stage_error(cls: type[StageError], message: str, fields: dict[str, str]) -> StageError:
    error = cls(message)
    error.__dict__.update(fields)
    return error


class StageStartError(StageError):
    """The worker of a stage could not start, or its setup failed."""


class StageInputError(StageError, ValueError):
    """A task lacks an attribute or column that the stage needs."""


class StageOutputError(StageError, ValueError):
    """A stage returned something that is neither a task, a list of tasks nor None."""


def exit_code(error: NemoRLError) -> int:
    """Return the exit code of a command that fails with `error`: 2 for a user's mistake, else 1."""
    return 2 if isinstance(error, ValueError) else 1


def sentence(error: NemoRLError) -> str:
    """Return the message of an error without a traceback.

    An error that Ray raises again from a worker has the full remote traceback as its text. In that case the message of
    its `cause` is returned.
    """
    raised = getattr(error, "cause", None)
    return str(raised if isinstance(raised, NemoRLError) else error)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and all of its causes, including those in the attribute `cause`, as Ray has it."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [current.__cause__, current.__context__, getattr(current, "cause", None)]
