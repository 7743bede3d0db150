"""Named combinations of the keys of a loss: `loss: dapo`, or `loss.recipe=dapo` on the command line.

A recipe sets keys of the sections `loss` and `grpo`. A key that a file or the command line gives overrides it. The
formulas are in `loss_functions` and `advantages`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_rl.errors import ConfigError
from nemo_rl.utils.names import did_you_mean

_GROUP_MEAN = {"grpo.advantage.baseline": "mean", "grpo.advantage.normalize_std": True}

LOSS_RECIPES: dict[str, dict[str, Any]] = {
    # Shao et al. (2024), arXiv:2402.03300, equations 3 and 4, with the KL coefficient of section 4.2.
    "grpo": {**_GROUP_MEAN, "loss.aggregation": "sequence", "loss.kl_coef": 0.04, "loss.kl_estimator": "k3"},
    # Liu et al. (2025), arXiv:2503.20783: neither the length of a completion nor the deviation of a group divides.
    "dr_grpo": {
        "grpo.advantage.baseline": "mean",
        "grpo.advantage.normalize_std": False,
        "loss.aggregation": "constant",
    },
    # Yu et al. (2025), arXiv:2503.14476: clip-higher, token-level loss, dynamic sampling, soft overlong punishment.
    "dapo": {
        **_GROUP_MEAN,
        "grpo.dynamic_sampling.enabled": True,
        "grpo.overlong_penalty": {},
        "loss.clip_ratio_low": 0.2,
        "loss.clip_ratio_high": 0.28,
        "loss.aggregation": "token",
    },
    # Zheng et al. (2025), arXiv:2507.18071, with the clip ratios of section 5.1.
    "gspo": {
        **_GROUP_MEAN,
        "loss.objective": "gspo",
        "loss.clip_ratio_low": 3e-4,
        "loss.clip_ratio_high": 4e-4,
        "loss.aggregation": "sequence",
    },
    # MiniMax (2025), arXiv:2506.13585, equation 4. The paper does not give the upper bound, which is 5 here.
    "cispo": {
        **_GROUP_MEAN,
        "loss.objective": "cispo",
        "loss.clip_ratio_low": 1.0,
        "loss.clip_ratio_high": 4.0,
        "loss.aggregation": "token",
    },
    # Ahmadian et al. (2024), arXiv:2402.14740: REINFORCE on whole completions, the KL divergence in the reward.
    "rloo": {
        "grpo.advantage.baseline": "leave_one_out",
        "grpo.advantage.normalize_std": False,
        "loss.objective": "reinforce",
        "loss.aggregation": "constant",
        "loss.constant_length": 1,
        "loss.kl_coef": 0.03,
        "loss.kl_estimator": "k1",
        "loss.kl_placement": "reward",
    },
    # Williams (1992): no baseline, no normalization.
    "reinforce": {
        "grpo.advantage.baseline": "none",
        "grpo.advantage.normalize_std": False,
        "loss.objective": "reinforce",
        "loss.aggregation": "constant",
        "loss.constant_length": 1,
    },
    # Hu et al. (2025), arXiv:2501.03262: PPO's clip, the KL divergence per token in the reward, normalization over the
    # batch.
    "reinforce_pp": {
        "grpo.advantage.baseline": "none",
        "grpo.advantage.normalize_std": True,
        "grpo.advantage.normalize_over": "batch",
        "loss.aggregation": "token",
        "loss.kl_coef": 0.001,
        "loss.kl_estimator": "k1",
        "loss.kl_placement": "reward_to_go",
    },
}


def with_recipe(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the keys of its loss recipe, below those that it gives itself.

    Args:
        content: plain data. `loss` may be the name of a recipe.

    Raises:
        ConfigError: there is no such recipe.

    Example:
        >>> with_recipe({"loss": {"recipe": "dr_grpo", "kl_coef": 0.1}})["loss"]
        {'aggregation': 'constant', 'recipe': 'dr_grpo', 'kl_coef': 0.1}
    """
    loss = content.get("loss")
    name = loss if isinstance(loss, str) else loss.get("recipe") if isinstance(loss, Mapping) else None
    if name is None:
        return dict(content)
    if name not in LOSS_RECIPES:
        hint = did_you_mean(str(name), LOSS_RECIPES)
        raise ConfigError(f"loss.recipe: there is no recipe {name!r}.{hint} Recipes: {', '.join(LOSS_RECIPES)}")
    recipe: dict[str, Any] = {}
    for key, value in LOSS_RECIPES[name].items():
        *parents, last = key.split(".")
        section = recipe
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    given = {**content, "loss": {"recipe": name} if isinstance(loss, str) else loss}
    return _merged(recipe, given)


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = low.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
