"""Example of a distribution that extends nemo_rl."""
