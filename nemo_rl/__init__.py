"""nemo_rl: registry-driven distributed workers on Ray, each worker class in its own uv-built venv."""


def __getattr__(name: str) -> str:
    """Read `__version__` from the installed package, or from `pyproject.toml` where a checkout is used as it is."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nemo-rl")
    except PackageNotFoundError:
        import tomllib
        from pathlib import Path

        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
