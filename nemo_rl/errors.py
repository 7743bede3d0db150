"""Every exception that nemo_rl raises on purpose.

::

    NemoRLError                         base of all; `except NemoRLError` catches what we mean to say
    ├── ConfigError (ValueError)        a key, value or override of a configuration is wrong
    ├── DataError (ValueError)          a data set is missing, empty or holds a broken record
    ├── VenvError                       a Python environment cannot be described, built or used
    │   ├── InvalidPyExecutableError (ValueError)   a py_executable string that we do not accept
    │   ├── RuntimeEnvError (ValueError)            a runtime_env field is unknown, malformed or clashes with another
    │   ├── LockMismatchError (ValueError)          uv.lock does not match pyproject.toml
    │   ├── UnknownExtraError (ValueError)          an extra or group that the project does not have
    │   ├── UvNotFoundError             uv is not installed
    │   ├── VenvBuildError              uv failed; carries command, node, output tail and log path
    │   │   └── NoSpaceError            the build ran out of disk
    │   ├── VenvLockTimeoutError        another builder holds the lock for too long
    │   ├── IncompatibleVenvError       the venv's Python or ray is not the driver's
    │   ├── VenvDriftError              the code asks for other packages than the venv that is there
    │   ├── BundleError (ValueError)    a bundle for offline builds is not safe, not whole, or for another machine
    │   └── BroadcastError              a venv or source archive from another node arrived incomplete or changed
    ├── ClusterError                    the Ray cluster cannot do what was asked
    │   ├── SubmissionError             the job server cannot be reached, or refuses
    │   ├── ResourceInsufficientError (ValueError)  more CPUs, GPUs or nodes asked for than there are
    │   └── NodeVenvError               making venvs ready failed on at least one node
    ├── WorkerError                     a worker or worker group failed
    │   ├── UnregisteredActorError (ValueError)     an FQN that the registry does not know
    │   ├── WorkerStartError            a worker died, or never answered, while starting
    │   ├── NodeLostError               a worker cannot start: its node has left the cluster
    │   └── AttestationError            a worker runs in another venv, Python or ray than it should
    ├── ModelError                      a model cannot be loaded, or a request does not fit it
    ├── WeightSyncError                 policy and generation disagree about the weights
    ├── EnvironmentFailure              an RL environment failed: never a reward of 0
    ├── TrainingError                   the loop must stop
    │   ├── LogprobMismatchError        generation and policy log-probabilities are too far apart
    │   └── NonFiniteError              loss or gradient is NaN or infinite
    ├── CheckpointError                 a checkpoint cannot be written, read or trusted
    └── PipelineError                   a data pipeline cannot run, or one of its stages failed
        ├── PipelineDefinitionError (ValueError)    stages, names, needs or options that do not go together
        ├── ResumeError (ValueError)    a run directory belongs to another pipeline, or is in use
        └── StageError                  a stage failed; carries stage, task and traceback
            ├── StageStartError         a stage's worker could not start or set up
            ├── StageInputError (ValueError)        a task lacks what the stage needs
            └── StageOutputError (ValueError)       a stage returned something that is no task

A message says what failed, the value seen, and how to fix it. Users' mistakes also derive from `ValueError`,
so that code which knows nothing of this package can catch them.
"""

from __future__ import annotations


class NemoRLError(Exception):
    """Base class of every error that nemo_rl raises on purpose."""


class ConfigError(NemoRLError, ValueError):
    """A configuration key, value or override is wrong."""


class DataError(NemoRLError, ValueError):
    """A data set is missing, empty, or holds a broken record (the message names file and line)."""


class VenvError(NemoRLError):
    """A Python environment cannot be described, built or used."""


class InvalidPyExecutableError(VenvError, ValueError):
    """A `py_executable` that is neither an interpreter's path nor an accepted `uv run ...` string."""


class RuntimeEnvError(VenvError, ValueError):
    """A `runtime_env` field is unknown, malformed, or cannot hold together with another."""


class LockMismatchError(VenvError, ValueError):
    """`uv.lock` is not what `pyproject.toml` asks for."""


class UnknownExtraError(VenvError, ValueError):
    """An extra or dependency group that the project does not declare."""


class UvNotFoundError(VenvError):
    """The `uv` executable cannot be found."""


class VenvBuildError(VenvError):
    """uv failed to build a venv.

    Attributes:
        node: host name where the build ran.
        command: the uv command, with secrets masked.
        output_tail: the last lines of uv's own output.
        log_path: file that holds the full output.
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
        # Ray sends errors between processes; keyword-only fields need help to survive pickling.
        return (_rebuild_build_error, (type(self), self.args[0], self.__dict__.copy()))


def _rebuild_build_error(cls: type[VenvBuildError], message: str, fields: dict[str, str]) -> VenvBuildError:
    error = cls(message)
    error.__dict__.update(fields)
    return error


class NoSpaceError(VenvBuildError):
    """A build ran out of disk space."""


class VenvLockTimeoutError(VenvError, TimeoutError):
    """Another process holds a venv's build lock for longer than the time-out."""


class IncompatibleVenvError(VenvError):
    """A venv's Python or ray version is not the driver's."""


class VenvDriftError(VenvError):
    """The code asks for other packages than the venv that is there holds, and the policy is to refuse."""


class BundleError(VenvError, ValueError):
    """A bundle for offline builds that is not safe to unpack, not whole, or made for another machine."""


class BroadcastError(VenvError):
    """A venv or source that was to come from another node did not arrive, or not as it was sent."""


class ClusterError(NemoRLError):
    """The Ray cluster cannot do what was asked."""


class SubmissionError(ClusterError):
    """Ray's job server cannot be reached, or refuses what was asked of it."""


class ResourceInsufficientError(ClusterError, ValueError):
    """The cluster holds fewer CPUs, GPUs or nodes than the job asks for."""


class NodeVenvError(ClusterError):
    """Making venvs ready failed on at least one node."""


class WorkerError(NemoRLError):
    """A worker or a worker group failed."""


class UnregisteredActorError(WorkerError, ValueError):
    """A worker class name that the registry does not know."""


class WorkerStartError(WorkerError):
    """A worker died or never answered while it was starting."""


class NodeLostError(WorkerStartError):
    """A worker cannot start, or start anew, because its node has left the Ray cluster."""


class AttestationError(WorkerError):
    """A worker runs in another venv, Python or ray than the one it was given."""


class ModelError(NemoRLError):
    """A model cannot be loaded, or a request does not fit it."""


class WeightSyncError(NemoRLError):
    """Policy and generation workers do not hold the same weights after a sync."""


class EnvironmentFailure(NemoRLError):
    """An RL environment failed to judge a sample. It is never turned into a reward."""


class TrainingError(NemoRLError):
    """Training cannot go on."""


class LogprobMismatchError(TrainingError):
    """Log-probabilities from generation and from the policy differ by more than the configured bound."""


class NonFiniteError(TrainingError):
    """A loss or gradient norm is NaN or infinite."""


class CheckpointError(NemoRLError):
    """A checkpoint cannot be written, read or trusted."""


class PipelineError(NemoRLError):
    """A data pipeline cannot run, or one of its stages failed."""


class PipelineDefinitionError(PipelineError, ValueError):
    """Stages, names, needs or options of a pipeline that do not go together. Nothing has been started."""


class ResumeError(PipelineError, ValueError):
    """A run directory that belongs to another pipeline or other inputs, or that a living run uses."""


class StageError(PipelineError):
    """A stage of a pipeline failed.

    Attributes:
        stage: its name.
        task_id: of the task that it failed on; empty when it is not about one task.
        traceback_text: the traceback in the stage's own process; empty where there is none.
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
    """A stage's worker could not be started, or its setup failed."""


class StageInputError(StageError, ValueError):
    """A task lacks an attribute or a column that the stage needs."""


class StageOutputError(StageError, ValueError):
    """A stage returned something that is neither a task, nor a list of tasks, nor None."""


def exit_code(error: NemoRLError) -> int:
    """What a command ends with: 2 for a user's mistake, 1 for an operation that failed."""
    return 2 if isinstance(error, ValueError) else 1


def sentence(error: NemoRLError) -> str:
    """What an error says. Of one that a worker raised, Ray's text is the worker's whole traceback."""
    raised = getattr(error, "cause", None)
    return str(raised if isinstance(raised, NemoRLError) else error)
