"""The worker of the torch backend. Runs in the BASE venv."""

from __future__ import annotations

import torch

from nemo_rl.models.cpu_threads import SMALL_MODEL
from nemo_rl.models.generation.generator import GeneratorSpec
from nemo_rl.models.generation.torch.generator import TorchGenerator
from nemo_rl.models.generation.worker import GenerationWorker


class TorchGenerationWorker(GenerationWorker):
    """Completes prompts with a `TorchGenerator`."""

    def make_generator(self, spec: GeneratorSpec) -> TorchGenerator:
        generator = TorchGenerator(spec)
        is_small = generator.decoder.num_parameters <= SMALL_MODEL
        if generator.device.type == "cpu" and is_small:
            generator.use_threads(torch.get_num_threads())
        return generator
