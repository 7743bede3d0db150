"""Runs a pipeline with the plugin's stage.

uv run python examples/plugin/run_shorten.py IN.jsonl OUT_DIR
"""

import sys

from nemo_rl.pipelines import Pipeline
from nemo_rl.pipelines.io.readers import JsonlReader
from nemo_rl.pipelines.io.writers import JsonlWriter

from nemo_rl_plugin.shorten_stage import Shorten

if __name__ == "__main__":
    source, target = sys.argv[1:]
    reader = JsonlReader(source, columns={"text": "string"})
    pipeline = Pipeline("shorten", stages=[reader, Shorten(2), JsonlWriter(target)])
    print(pipeline.describe())
    pipeline.run()
