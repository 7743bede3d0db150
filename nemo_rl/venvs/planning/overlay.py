"""Additive venvs (overlays): packages that are installed on top of a base venv or interpreter.

An additive venv holds only the packages whose resolved version the base does not provide. Its site-packages directory
precedes the base's on `sys.path`, so its packages override those of the base, and the others stay importable. Version
constraints of base packages on an overridden package are ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from packaging.utils import canonicalize_name

from nemo_rl import settings
from nemo_rl.errors import RuntimeEnvError, VenvBuildError
from nemo_rl.secrets import mask_secrets
from nemo_rl.venvs.planning.plan import (
    Package,
    Resolution,
    VenvPlan,
    load_resolution,
    package_from_lock,
    save_resolution,
)
from nemo_rl.venvs.planning.relocation import located
from nemo_rl.venvs.planning.requirements import is_index_option, is_option, split_constraints
from nemo_rl.venvs.planning.spec import Spec, VenvSpec
from nemo_rl.venvs.storage.layout import Store
from nemo_rl.venvs.storage.manifest import FORMAT
from nemo_rl.venvs.uv import BuildLog, run_uv

# Every venv has scripts with these prefixes. They are never taken from the base.
_VENV_SCRIPTS = ("python", "activate", "deactivate", "pydoc", "pip")
_HEAD_BYTES = 1024
_HASH = re.compile(r"\s--hash[=\s](\S+)")
_NAME = re.compile(r"[^A-Za-z0-9._-]")  # what ends the name of a requirement
_NO_SOLUTION = re.compile(r"No solution found[^\n]*\n\W*(?:cause: )?(.+)", re.DOTALL)
_DIST_INFO = re.compile(r"(.+)-([^-]+)\.(?:dist-info|egg-info)")


def plan_overlay(spec: Spec, base: VenvPlan, store: Store, variables: Mapping[str, str]) -> VenvPlan:
    """Resolve `spec.requirements` over `base`.

    The requirements are resolved once per store and base, with a preference for the base's versions, and the result is
    cached. So the version of an unpinned package does not change later, and a warm call needs no network.
    `variables` are those that builds receive.
    """
    pins = {package.name: package.version for package in base.packages if package.version is not None}
    key = hashlib.sha256(json.dumps([FORMAT, base.digest, spec.requirements]).encode()).hexdigest()
    resolution = load_resolution(store, key)
    if resolution is None:
        resolution = Resolution(tuple(_resolve(spec, base, pins, store, variables)))
        save_resolution(store, key, resolution)
    return VenvPlan(
        spec=spec,
        python=base.python,
        packages=resolution.packages,
        expected=base.expected,
        base=base,
        index_options=tuple(line for line in spec.requirements if is_index_option(line)),
        build_variables=tuple(variables.items()),
    )


def installed_distributions(site_packages: Path) -> dict[str, str]:
    """Return name -> version of the distributions in a directory, from the names of their metadata directories."""
    try:
        names = sorted(entry.name for entry in site_packages.iterdir())
    except OSError:
        return {}
    matches = [_DIST_INFO.fullmatch(name) for name in names]
    return {canonicalize_name(match[1]): match[2] for match in matches if match}


def _resolve(
    spec: Spec, base: VenvPlan, pins: dict[str, str], store: Store, variables: Mapping[str, str]
) -> list[Package]:
    listed = [line for line in spec.requirements if not is_option(line)]
    if not listed:
        raise RuntimeEnvError(f"The list of requirements {list(spec.requirements)} contains no package.")
    with tempfile.TemporaryDirectory(prefix="nemo_rl_resolve_") as directory:
        requirements, lock = Path(directory, "requirements.in"), Path(directory, "pylock.toml")
        lines, constraints = split_constraints(line for line in spec.requirements if line != "--pre")
        requirements.write_text("\n".join(lines) + "\n")
        # uv prefers the versions in an existing output file, so it keeps the base's versions that the list allows.
        lock.write_text(_lock_text(pins))
        arguments = ["pip", "compile", str(requirements), "-o", str(lock), "--python", base.python.executable]
        arguments += ["--prerelease", "allow"] if "--pre" in spec.requirements else []  # uv ignores it in a file
        if constraints:
            Path(directory, "constraints.txt").write_text("\n".join(constraints) + "\n")
            arguments += ["--constraints", f"{directory}/constraints.txt"]
        project = ["--project", str(located(spec.project))] if isinstance(spec, VenvSpec) else []
        what = f"Resolving {', '.join(listed)} over `{base.spec}`"
        arguments += [*project, "--generate-hashes", "--no-header", "--quiet"]
        with BuildLog(store.new_log("resolve"), only_on_failure=True) as log:
            try:
                run_uv(arguments, what=what, cwd=directory, extra_env=variables, log=log)
            except VenvBuildError as error:
                reason = _NO_SOLUTION.search(error.output_tail)
                if reason is None:
                    raise
                text = f"uv finds no versions of {', '.join(listed)} for `{base.spec}`: {' '.join(reason[1].split())}"
                raise VenvBuildError(mask_secrets(text), **vars(error)) from error
        entries = tomllib.loads(lock.read_text()).get("packages", [])
        packages = [_restricted(package_from_lock(entry, Path(directory)), lines) for entry in entries]
    return [package for package in packages if _differs(package, pins)]


def _restricted(package: Package, lines: list[str]) -> Package:
    """Return a package with only those of its hashes that the list allows: uv ignores them when it resolves."""
    given = {
        value
        for line in lines
        if package.location == line.split()[0] or canonicalize_name(_NAME.split(line)[0]) == package.name
        for value in _HASH.findall(line)
    }
    allowed = given.intersection(package.hashes)
    if given and not allowed and any(value.startswith("sha") for value in package.hashes):
        raise RuntimeEnvError(
            f"No file of {package} has a hash that the list of requirements allows: {', '.join(sorted(given))}. Its "
            f"files have {', '.join(package.hashes)}."
        )
    return replace(package, hashes=tuple(sorted(allowed or given))) if given else package


def _lock_text(pins: dict[str, str]) -> str:
    tables = [f'[[packages]]\nname = "{name}"\nversion = "{version}"\n' for name, version in pins.items()]
    return "\n".join(['lock-version = "1.0"', 'created-by = "nemo_rl"', *(tables or ["packages = []"])])


def _differs(package: Package, pins: dict[str, str]) -> bool:
    """Return whether the package must be installed over the base: its version differs, or it comes from a path or URL,
    where versions prove nothing."""
    if package.local is not None or package.location is not None:
        return True
    return pins.get(package.name) != package.version


def install_lines(plan: VenvPlan) -> list[str]:
    """Return the lines of a requirements file that installs the packages of an additive venv, with pins and hashes."""
    return [*plan.index_options, *(install_line(package, plan.spec) for package in plan.packages)]


def install_line(package: Package, spec: Spec) -> str:
    """Return the line of a requirements file that installs one package of a venv with this spec."""
    if package.local is not None:
        return f"{'-e ' if package.local.editable else ''}{located(package.local.path)}"
    hashes = [f"--hash={value}" for value in package.hashes if not value.startswith("url:")]
    if package.location is None:
        return " ".join([f"{package.name}=={package.version}", *hashes])
    if settings.MASK in package.location:  # only the user's requirement holds the credentials
        for line in spec.requirements:
            if canonicalize_name(line.partition("@")[0].strip()) == package.name:
                return line if "--hash" in line else " ".join([line, *hashes])
    return " ".join([f"{package.name} @ {package.location}", *hashes])


def add_base_scripts(scripts: Path, base_scripts: Path) -> None:
    """Add the base's console scripts to an additive venv.

    A script that the base's interpreter runs is copied, with this venv's interpreter in its first line; other programs
    are linked.

    Args:
        scripts: `bin` of the additive venv; existing files in it stay.
        base_scripts: `bin` of the base.
    """
    for entry in sorted(base_scripts.iterdir()) if base_scripts.is_dir() else ():
        target = scripts / entry.name
        if entry.name.startswith(_VENV_SCRIPTS) or not entry.is_file() or os.path.lexists(target):
            continue
        with entry.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            rest = file.read() if head.startswith(b"#!") else b""
        interpreters = [os.fsencode(path / "python") for path in {base_scripts, base_scripts.resolve()}]
        if head.startswith(b"#!") and any(interpreter in head for interpreter in interpreters):
            for interpreter in interpreters:
                head = head.replace(interpreter, os.fsencode(scripts / "python"))
            target.write_bytes(head + rest)
            shutil.copymode(entry, target)
        else:
            target.symlink_to(entry)
