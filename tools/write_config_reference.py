"""Write docs/configuration.md from the typed configuration. A test fails when the page is not current.

python tools/write_config_reference.py
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.algorithms.distillation_config import DistillationJobConfig
from nemo_rl.algorithms.dpo_config import DPOJobConfig
from nemo_rl.algorithms.eval_config import EvalConfig
from nemo_rl.algorithms.reward_model_config import RewardModelJobConfig
from nemo_rl.algorithms.sft_config import SFTJobConfig
from nemo_rl.environments.scoring_config import JudgeConfig, RewardModelConfig
from nemo_rl.jobs.curate_math import CurateConfig
from nemo_rl.utils.config import ConfigModel, KeyInfo, iter_keys

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

HEAD = """\
# Configuration

<!-- Written by tools/write_config_reference.py from the typed configuration: change that and run the tool. -->

This page lists every configuration key of all jobs. A job reads a YAML file (`--config FILE`) and overrides
(`section.key=value`), which take precedence over the file. A file may extend another one with `defaults: other.yaml`,
or several with `defaults: [a.yaml, b.yaml]`, where later files take precedence. Unknown keys and values of the wrong
type are errors that name the key and the nearest valid one. `--help` prints the same list
on the command line. Overrides may have the forms of Hydra: `+key=value` and `++key=value` mean the same as `key=value`,
and `~key` drops what the file says about a key or section.

```yaml
defaults: grpo_math_embedded.yaml   # relative to this file
grpo:
  num_prompts_per_step: 64
policy:
  optimizer: {lr: 5.0e-4}
```
"""

JOBS: list[tuple[str, str, type[ConfigModel]]] = [
    ("GRPO", "Keys of `examples/run_grpo_math.py`.", MasterConfig),
    ("Supervised fine-tuning", "Keys of `examples/run_sft.py`.", SFTJobConfig),
    ("Direct preference optimization", "Keys of `examples/run_dpo.py`.", DPOJobConfig),
    ("Reward models", "Keys of `examples/run_reward_model.py`.", RewardModelJobConfig),
    ("Distillation", "Keys of `examples/run_distillation.py`.", DistillationJobConfig),
    ("Evaluation", "Keys of `examples/run_eval.py`.", EvalConfig),
    ("Curation", "Keys of `examples/run_curate_math.py`.", CurateConfig),
]
# What `env.<name>.config` holds for the environments that declare it.
ENVIRONMENTS: list[tuple[str, str, type[ConfigModel]]] = [
    ("Reward model", "Keys of `env.<name>.config` with the class `reward_model`.", RewardModelConfig),
    ("Judge", "Keys of `env.<name>.config` with the class `judge`.", JudgeConfig),
]
# Subsections with a heading of their own.
LARGE_SECTIONS = ("policy.generation", "policy.options", "policy.embedded", "scoring.generation")


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, description, schema in [*JOBS, *ENVIRONMENTS]:
        parts.append(f"\n## {title}\n\n{description}\n")
        sections: dict[str, list[KeyInfo]] = {"": []}
        for key in iter_keys(schema):
            sections.setdefault(_section(key.name), []).append(key)
        for section, keys in sections.items():
            if keys:
                heading = f"{title}: {section or 'top level'}"
                parts.append(f"\n### {heading}\n\n{_table(keys)}")
    return "".join(parts)


def _section(key: str) -> str:
    """The heading of a key: its top section, or one of the large subsections."""
    large = [name for name in LARGE_SECTIONS if key.startswith(f"{name}.")]
    return large[0] if large else key.partition(".")[0] if "." in key else ""


def _table(keys: Iterable[KeyInfo]) -> str:
    rows = "".join(
        f"| `{key.name}` | {_escape(key.type)} | {_code(key.default)} | {_escape(key.help)} |\n" for key in keys
    )
    return f"| key | type | default | meaning |\n| --- | --- | --- | --- |\n{rows}"


def _code(text: str) -> str:
    return f"`{_escape(text)}`" if text else ""


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") if "`" not in text else text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
