"""Finds the model that a name on the command line means: a model, a checkpoint, or a checkpoint of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_rl.errors import ConfigError
from nemo_rl.jobs.model_files import check_model_path
from nemo_rl.models.policy.config import EMBEDDED_MODELS
from nemo_rl.utils.checkpoint import Checkpoint, CheckpointingConfig, CheckpointStore
from nemo_rl.utils.config import validate

CONFIG_FILE = "config.yaml"
_MODEL = Path("policy") / "model"


@dataclass(frozen=True)
class ModelSource:
    """Locates a model.

    Attributes:
        name: Hugging Face directory or hub name, or an embedded model: what `policy.model_name` accepts.
        run: directory of the run that the model is a checkpoint of; None for another model.
    """

    name: str
    run: Path | None = None


def find_model(name: str, step: int | None = None, *, key: str = "MODEL") -> ModelSource:
    """Return the model of a Hugging Face directory or hub name, an embedded model, a checkpoint, or a run.

    Of a run it is the best checkpoint by the run's `checkpointing.metric_name`, or the latest if none has the metric.

    Args:
        name: the model, or the directory of the checkpoint or run.
        step: of a run, the checkpoint of this step instead.
        key: what messages call a name that does not exist.

    Raises:
        ConfigError: the directory is none of these, or the run has no such checkpoint.
    """
    path = Path(name).expanduser()
    if name in EMBEDDED_MODELS or not path.is_dir() or (path / "config.json").is_file():
        check_model_path(name, key)
        return ModelSource(str(path) if path.is_dir() and name not in EMBEDDED_MODELS else name)
    if (path / CONFIG_FILE).is_file():
        return ModelSource(str(_checkpoint_of_run(path, step).path / _MODEL), path)
    if path.name == "policy":
        path = path.parent
    if (path / _MODEL / "config.json").is_file():
        complete = CheckpointStore(path.parent, CheckpointingConfig()).complete()
        if path.resolve() not in [checkpoint.path.resolve() for checkpoint in complete]:
            raise ConfigError(f"{name} is not a complete checkpoint; name another one, or its run")
        run = path.parent.parent
        return ModelSource(str(path / _MODEL), run if (run / CONFIG_FILE).is_file() else None)
    raise ConfigError(
        f"{name} is neither a Hugging Face model (config.json), nor a checkpoint of a policy ({_MODEL}), nor the "
        f"directory of a run ({CONFIG_FILE})"
    )


def _checkpoint_of_run(run: Path, step: int | None) -> Checkpoint:
    config = _checkpointing(run)
    store = CheckpointStore(Path(config.checkpoint_dir or run / "checkpoints"), config)
    complete = store.complete()
    if not complete:
        raise ConfigError(f"the run {run} has no complete checkpoint in {store.directory}")
    if step is None:
        return store.best() or complete[-1]
    chosen = [checkpoint for checkpoint in complete if checkpoint.step == step]
    if not chosen:
        steps = ", ".join(str(checkpoint.step) for checkpoint in complete)
        raise ConfigError(f"--step {step}: the run {run} has checkpoints of the steps {steps}")
    return chosen[0]


def _checkpointing(run: Path) -> CheckpointingConfig:
    """Read one section only, because the run may be of any kind of job."""
    path = run / CONFIG_FILE
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        section = content["checkpointing"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not the configuration of a training run ({error!r})") from error
    return validate(CheckpointingConfig, section, where=f"{path}: checkpointing")


def label(name: str) -> str:
    """Return how tables and the report name a model.

    Example:
        >>> label("results/grpo/001/checkpoints/step_000020/policy/model")
        'results/grpo/001/step_000020'
    """
    path = Path(name)
    if path.parts[-2:] != _MODEL.parts:
        return name
    checkpoint = path.parents[1]
    parent = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    return str(parent / checkpoint.name)
