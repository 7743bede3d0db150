"""`nemo-rl init` writes a project that uses this package; `nemo-rl add` adds extras to an existing one."""

from __future__ import annotations

import keyword
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from nemo_rl import settings
from nemo_rl.cli.options import Json
from nemo_rl.errors import ConfigError

# The project that `init` copies, as a user would write it. Its names are replaced everywhere, in paths too.
TEMPLATE = Path(__file__).with_name("template")
TEMPLATE_NAME, TEMPLATE_MODULE = "my-project", "my_project"
_GITIGNORE = ".gitignore"  # without the dot in the template, where it must not have an effect
STACKS = ("vllm", "vllm-cpu", "mcore")  # the extras of a new project

Source = Annotated[
    str | None,
    typer.Option(
        "--nemo-rl",
        metavar="PATH|URL|REQUIREMENT",
        help="Where the project takes nemo-rl from. Default: where the running one was installed from.",
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this module in `app`."""
    app.command()(init)
    app.command()(add)


def init(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Directory of the project.")] = Path(),
    name: Annotated[str | None, typer.Option("--name", help="Name of the project. Default: the directory's.")] = None,
    nemo_rl: Source = None,
    extras: Annotated[bool, typer.Option("--extras/--no-extras", help=f"Add the extras {', '.join(STACKS)}.")] = True,
    json: Json = False,
) -> None:
    """Write a project with a worker class, a GRPO configuration, a script, a test and a notebook, and lock it."""
    from nemo_rl.cli import display
    from nemo_rl.cli.project_file import PackageSource, add_extras, lock

    directory = directory.expanduser().resolve()
    project_name = _project_name(name or directory.name)
    source = PackageSource.installed() if nemo_rl is None else PackageSource.parse(nemo_rl)
    files = _write_template(directory, project_name)
    add_extras(directory, STACKS if extras else (), source)
    display.note(f"nemo-rl: {len(files)} files written to {directory}; uv lock resolves its packages")
    lock(directory, retry=f"run `uv lock` in {directory}")
    if json:
        display.print_json({"project": str(directory), "name": project_name, "files": sorted(files)})
        return
    display.print_line(f"The project {project_name} is ready. In {directory}:\n")
    commands = {
        "uv run run.py": "call a worker in a venv of its own",
        "uv run nemo-rl grpo --config configs/grpo.yaml": "train",
        "uv run --extra distance --group test pytest": "test",
        "uv run --group notebook jupyter lab notebook.ipynb": "open the notebook",
    }
    for command, purpose in commands.items():
        display.print_line(f"  {command:<52}# {purpose}")


def add(
    extras: Annotated[list[str], typer.Argument(metavar="EXTRA...", help="For example vllm, vllm-cpu or mcore.")],
    nemo_rl: Source = None,
    json: Json = False,
) -> None:
    """Add extras of nemo-rl to the project of the working directory, and lock it. On failure nothing is changed."""
    from nemo_rl.cli import display
    from nemo_rl.cli.project_file import PackageSource, add_extras, check_extras_exist, lock, restored_on_failure

    names = check_extras_exist(extras)
    source = None if nemo_rl is None else PackageSource.parse(nemo_rl)
    project = settings.project_root()
    with restored_on_failure(project):
        changes = add_extras(project, names, source)
        if changes:
            display.note(f"nemo-rl: uv lock resolves the packages of {project}")
        lock(project, retry="run the command again")
    if json:
        display.print_json({"project": str(project), "changes": changes})
        return
    display.print_line(f"{project / 'pyproject.toml'}: {'' if changes else 'nothing to add'}".rstrip())
    for change in changes:
        display.print_line(f"  {change}")


def _project_name(text: str) -> str:
    """Return the normalised name of a project. Raises `ConfigError` if its module cannot be imported by that name."""
    from packaging.utils import canonicalize_name

    name = canonicalize_name(text.strip(" ._-"))
    module = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or not module.isidentifier():
        raise ConfigError(f"{text!r} is not a name of a project and a Python module; choose one with --name")
    taken = {*sys.stdlib_module_names, *keyword.kwlist, *metadata.packages_distributions()}
    if module in taken or name in _template_requirements():
        raise ConfigError(f"the name {name!r} belongs to Python or to another package; choose one with --name")
    return name


def _template_requirements() -> set[str]:
    """Return the names of the packages that a new project depends on."""
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    content = tomllib.loads((TEMPLATE / "pyproject.toml").read_text(encoding="utf-8"))
    requirements = [*content["project"]["optional-dependencies"]["distance"]]
    requirements += [item for group in content["dependency-groups"].values() for item in group]
    return {"nemo-rl", *(canonicalize_name(Requirement(item).name) for item in requirements)}


def _write_template(directory: Path, name: str) -> list[str]:
    """Copy the template with the project's name, and return the paths. Keeps a `.gitignore`.

    Raises `ConfigError` if another file exists, or if `directory` is or is below a file.
    """
    sources = {}
    for path in sorted(path for path in TEMPLATE.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        relative = path.relative_to(TEMPLATE).as_posix()
        sources[_GITIGNORE if path.name == _GITIGNORE[1:] else _named(relative, name)] = path
    if (directory / _GITIGNORE).exists():
        del sources[_GITIGNORE]
    for parent in (directory, *directory.parents):
        if parent.exists() and not parent.is_dir():
            raise ConfigError(f"{parent} is a file, so no project can be written to {directory}; choose a directory")
    existing = [relative for relative in sources if (directory / relative).exists()]
    if existing:
        fix = "add extras with `nemo-rl add`, or " if "pyproject.toml" in existing else ""
        raise ConfigError(f"{directory} already has {', '.join(existing)}; {fix}choose another directory")
    for relative, path in sources.items():
        target = directory / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_named(path.read_text(encoding="utf-8"), name), encoding="utf-8")
    return list(sources)


def _named(text: str, name: str) -> str:
    return text.replace(TEMPLATE_NAME, name).replace(TEMPLATE_MODULE, name.replace("-", "_"))
