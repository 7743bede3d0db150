"""Supervised fine-tuning: a policy learns to continue conversations as the data does.

The loss is on the tokens of the assistant's turns (`nemo_rl.data.conversation_encoder`).
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rl.algorithms.loss_functions import NLLLoss
from nemo_rl.algorithms.record_training import RecordTraining
from nemo_rl.algorithms.sft_config import SFTJobConfig


@dataclass
class SFT(RecordTraining[SFTJobConfig]):
    """Runs the training loop of supervised fine-tuning; see `RecordTraining`.

    Example::

        sft = SFT(config=config, policy=policy, loader=loader, validation=None, recorder=recorder, checkpoints=None)
        reason = sft.run()
    """

    def _loss(self) -> NLLLoss:
        return NLLLoss()
