"""The worker of the torch backend. Runs in the BASE venv."""

from __future__ import annotations

from nemo_rl.models.generation.generator import GeneratorSpec
from nemo_rl.models.generation.torch.generator import TorchGenerator
from nemo_rl.models.generation.worker import GenerationWorker


class TorchGenerationWorker(GenerationWorker):
    """Completes prompts with a `TorchGenerator`."""

    def make_generator(self, spec: GeneratorSpec) -> TorchGenerator:
        return TorchGenerator(spec)
