"""nemo_rl: registry-driven distributed workers on Ray, each worker class in its own uv-built venv."""

__version__ = "0.1.0"
