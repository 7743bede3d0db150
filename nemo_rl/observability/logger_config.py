"""Defines the `logger` section of a configuration."""

from __future__ import annotations

from pydantic import Field

from nemo_rl.utils.config import ConfigModel


class WandbConfig(ConfigModel):
    """Configures Weights & Biases."""

    enabled: bool = Field(False, description="Log to Weights & Biases (`uv run --extra wandb ...`).")
    project: str = Field("nemo_rl", description="Project name.")
    name: str | None = Field(None, description="Run name. Null: the run directory's name.")


class MlflowConfig(ConfigModel):
    """Configures MLflow."""

    enabled: bool = Field(False, description="Log to MLflow (`uv run --extra mlflow ...`).")
    experiment_name: str = Field("nemo_rl", description="Experiment name.")
    run_name: str | None = Field(None, description="Run name. Null: the run directory's name.")
    tracking_uri: str | None = Field(None, description="Tracking server. Null: MLflow's default.")


class LoggerConfig(ConfigModel):
    """Configures a run's directory and logging backends."""

    log_dir: str | None = Field(
        None,
        description="Directory of the run's files. Null: results/<config>/<number>; an unfinished run is resumed.",
    )
    tensorboard: bool = Field(True, description="Write TensorBoard event files to log_dir/tensorboard.")
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    mlflow: MlflowConfig = Field(default_factory=MlflowConfig)
    max_rollouts_mb: int = Field(
        1024,
        ge=0,
        description="Size limit in MB of the rollouts kept in log_dir/rollouts, one Parquet file per training step. "
        "Beyond it, the oldest are removed. 0: none are kept.",
    )
    num_samples: int = Field(
        8, ge=0, description="Completions per validation and environment that are stored for the report."
    )
    report: bool = Field(True, description="Write report.html at the end of the run.")
