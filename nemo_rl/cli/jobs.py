"""The commands that run a job of this package, such as `nemo-rl grpo`, like the scripts in examples/."""

from __future__ import annotations

import typer

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this module in `app`."""
    app.command(context_settings=_PASS_ON)(grpo)
    app.command(context_settings=_PASS_ON)(sft)
    app.command(context_settings=_PASS_ON)(dpo)
    app.command("reward-model", context_settings=_PASS_ON)(reward_model)
    app.command(context_settings=_PASS_ON)(distill)
    app.command("eval", context_settings=_PASS_ON)(evaluate)
    app.command(context_settings=_PASS_ON)(curate)


def grpo(context: typer.Context) -> None:
    """Train a model with GRPO: [--config FILE|RECIPE] [--dry-run] [key=value ...]."""
    from nemo_rl.jobs.grpo_job import main

    raise typer.Exit(main(context.args, program=context.command_path))


def sft(context: typer.Context) -> None:
    """Fine-tune a model on conversations: [--config FILE|RECIPE] [--dry-run] [key=value ...]."""
    from nemo_rl.jobs.sft_job import main

    raise typer.Exit(main(context.args, program=context.command_path))


def dpo(context: typer.Context) -> None:
    """Train a model on preference pairs by DPO: [--config FILE|RECIPE] [--dry-run] [key=value ...]."""
    from nemo_rl.jobs.dpo_job import main

    raise typer.Exit(main(context.args, program=context.command_path))


def reward_model(context: typer.Context) -> None:
    """Train a reward model on preference pairs: [--config FILE|RECIPE] [--dry-run] [key=value ...]."""
    from nemo_rl.jobs.reward_model_job import main

    raise typer.Exit(main(context.args, program=context.command_path))


def distill(context: typer.Context) -> None:
    """Train a student on a teacher's scores of its samples: [--config FILE|RECIPE] [--dry-run] [key=value ...]."""
    from nemo_rl.jobs.distillation_job import main

    raise typer.Exit(main(context.args, program=context.command_path))


def evaluate(context: typer.Context) -> None:
    """Evaluate models and checkpoints: MODEL... [--data FILE] [--step N] [--config FILE|RECIPE] [key=value ...]."""
    from nemo_rl.jobs.eval_job import main

    raise typer.Exit(main(context.args, program=context.command_path))


def curate(context: typer.Context) -> None:
    """Curate math problems into training data: [--config FILE|RECIPE] [--dry-run] [key=value ...]."""
    from nemo_rl.jobs.curate_math import main

    raise typer.Exit(main(context.args, program=context.command_path))
