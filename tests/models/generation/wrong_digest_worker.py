"""A generation worker that reports a wrong digest and does not compare it itself."""

from __future__ import annotations

from nemo_rl.models.generation.generator import GeneratorSpec
from nemo_rl.models.generation.torch.generator import TorchGenerator
from nemo_rl.models.generation.worker import GenerationWorker
from nemo_rl.models.weights.interfaces import WeightStream, WeightUpdate


class WrongDigestGenerator(TorchGenerator):
    def update_weights(self, update: WeightUpdate | WeightStream) -> str:
        super().update_weights(update)
        return "f" * 32


class WrongDigestWorker(GenerationWorker):
    def make_generator(self, spec: GeneratorSpec) -> TorchGenerator:
        return WrongDigestGenerator(spec)
