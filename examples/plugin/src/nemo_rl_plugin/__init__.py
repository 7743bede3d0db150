"""An example of a distribution that extends nemo_rl."""
