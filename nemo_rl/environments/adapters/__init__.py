"""Environments of other libraries. Each module imports its library: import it only in the environment's venv."""
