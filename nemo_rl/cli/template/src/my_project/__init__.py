"""Workers of my-project."""

# Worker class -> the Python that it runs in: the venv of this project with an extra.
ACTOR_ENVIRONMENTS = {
    "my_project.distance_worker.DistanceWorker": "uv run --locked --extra distance",
}
