"""Compares the files of venvs with the RECORDs of their packages: sizes when a venv is built, hashes at any time later.

This file needs nothing but the standard library, because the driver's own venv may be the damaged one. Any Python 3.8
or later runs it on venvs and on directories of venvs::

    python3 nemo_rl/venvs/storage/verify.py .venv venvs

A RECORD lists the files of a package with their sizes and hashes. uv writes it at installation, with the scripts whose
first line it changed, and with `INSTALLER`, `REQUESTED` and `direct_url.json`. It does not list bytecode, which is
compiled later. Two packages may list the same file; the one that was installed last provides it.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

MANIFEST_FILE = "nemo_rl_venv.json"
_DIST_INFO = re.compile(r"(.+?)-[^-]+\.dist-info")
_DIGEST = re.compile(r"[0-9a-f]{16}")
_BLOCK_BYTES = 2**20


class RecordedFile(NamedTuple):
    """Describes one line of a RECORD.

    Attributes:
        package: normalized name of the package.
        path: absolute path.
        hash_field: the hash as it is in the RECORD, such as `sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU`.
        size: in bytes; None if the RECORD does not contain it.
    """

    package: str
    path: str
    hash_field: str
    size: int | None

    @property
    def algorithm(self) -> str | None:
        """The algorithm of the hash; None without a hash."""
        return _hash_of(self.hash_field)[0]

    @property
    def digest(self) -> str | None:
        """The hash, hexadecimal; None without one."""
        return _hash_of(self.hash_field)[1]


class Damage(NamedTuple):
    """Describes a damaged file.

    Attributes:
        package: normalized name of its package; empty for a file that belongs to none.
        path: absolute path.
        problem: begins with `missing`, `altered`, `added` or `cannot`.
    """

    package: str
    path: str
    problem: str


def recorded_files(record: str) -> list[RecordedFile]:
    """Return the files that a RECORD lists with a hash or a size, except bytecode.

    Args:
        record: path of the RECORD in a `.dist-info` directory.

    Raises:
        ValueError: the file is not a RECORD.
        OSError: the file cannot be read.
    """
    package = package_of(record)
    site_packages = os.path.dirname(os.path.dirname(record))
    files = []
    with open(record, encoding="utf-8", newline="") as lines:
        try:
            rows = list(csv.reader(lines))
        except csv.Error as error:
            raise ValueError(str(error)) from None
    for row in rows:
        if not row or ("__pycache__" in row[0] and os.path.basename(os.path.dirname(row[0])) == "__pycache__"):
            continue
        hash_field = row[1] if len(row) > 1 else ""
        size = int(row[2]) if len(row) > 2 and row[2].isdigit() else None
        if size is not None or _hash_of(hash_field)[1] is not None:
            path = f"{site_packages}/{row[0]}"
            if row[0][:1] in ("/", "") or path[0] != "/" or path[-1] == "/" or "//" in path or "/." in path:
                path = os.path.normpath(os.path.join(site_packages, row[0]))  # takes longer than all the rest
            files.append(RecordedFile(package, path, hash_field, size))
    return files


def package_of(record: str) -> str:
    """Return the normalized name of the package whose `.dist-info` directory contains the file `record`.

    Example:
        >>> package_of("site-packages/ruamel.yaml-0.18.dist-info/RECORD")
        'ruamel-yaml'
    """
    name = os.path.basename(os.path.dirname(record))
    match = _DIST_INFO.fullmatch(name)
    return re.sub(r"[-_.]+", "-", match.group(1) if match else name).lower()


def _hash_of(field: str) -> tuple[str | None, str | None]:
    algorithm, _, value = field.partition("=")
    if not value or algorithm not in hashlib.algorithms_available:
        return None, None
    try:
        return algorithm, base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()
    except ValueError:
        return None, None


def _hash_field(sha256: str) -> str:
    """Return a hexadecimal hash as a RECORD contains it; empty if it is not a hash."""
    try:
        return f"sha256={base64.urlsafe_b64encode(bytes.fromhex(sha256)).decode()}"
    except ValueError:
        return ""


def records_of(site_packages: str) -> list[str]:
    """Return the path of the RECORD of every package in a site-packages directory."""
    names = sorted(name for name in os.listdir(site_packages) if name.endswith(".dist-info"))
    return [path for name in names if os.path.isfile(path := os.path.join(site_packages, name, "RECORD"))]


def damaged_files(
    records: Iterable[str], *, compare_hashes: bool, listings: dict[str, list[RecordedFile]] | None = None
) -> Iterator[Damage]:
    """Yield every file that differs from the RECORDs that list it.

    Args:
        records: paths of the RECORDs of one venv.
        compare_hashes: read every file. With False only sizes are compared, and a file with another size is read:
            some packages were published with a wrong size.
        listings: receives the files that each RECORD lists, by its path.
    """
    files: dict[str, list[RecordedFile]] = {}
    for record in records:
        try:
            listed = recorded_files(record)
            metadata = os.path.join(os.path.dirname(record), "METADATA")
            if not any(recorded.path == metadata for recorded in listed):
                yield Damage(package_of(record), record, "altered: it does not list the package's METADATA")
            if listings is not None:
                listings[record] = listed
            for recorded in listed:
                files.setdefault(recorded.path, []).append(recorded)
        except (OSError, ValueError) as error:
            yield Damage(package_of(record), record, f"cannot be read: {error}")
    for path, expected in files.items():
        problem = _problem(path, expected, compare_hashes)
        if problem is not None:
            yield Damage(expected[-1].package, path, problem)


def _problem(path: str, expected: Sequence[RecordedFile], compare_hashes: bool) -> str | None:
    try:
        size = os.stat(path).st_size
        if not compare_hashes and any(recorded.size in (size, None) for recorded in expected):
            return None
        hashes: dict[str, str] = {}
        for recorded in expected:
            algorithm = recorded.algorithm
            if algorithm is None:
                is_equal = recorded.size == size
            else:
                if algorithm not in hashes:
                    hashes[algorithm] = file_hash(path, algorithm)
                is_equal = hashes[algorithm] == recorded.digest
            if is_equal:
                return None
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    sizes = [recorded.size for recorded in expected if recorded.size is not None]
    if sizes and size not in sizes:
        return f"altered: {size} bytes instead of {sizes[-1]}"
    return "altered: its content differs from the installed file"


def file_hash(path: str, algorithm: str = "sha256") -> str:
    """Return the hash of a file, hexadecimal."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def verify_venv(root: str) -> Iterator[Damage]:
    """Yield every damaged file of a venv, which may also be one that nemo_rl did not build.

    A sealed venv has a manifest with the hash of every RECORD. Other venvs are compared with their RECORDs only.
    """
    python = os.path.join(root, "bin", "python")
    if not os.access(python, os.X_OK):  # follows the link to the base interpreter
        yield Damage("", python, f"cannot start: its base interpreter is {os.path.realpath(python)}")
    library = os.path.join(root, "lib")
    versions = sorted(os.listdir(library)) if os.path.isdir(library) else []
    candidates = [os.path.join(library, version, "site-packages") for version in versions]
    directories = [directory for directory in candidates if os.path.isdir(directory)]
    if not directories:
        yield Damage("", library, "missing: there is no site-packages directory")
        return
    records = records_of(directories[0])
    if os.path.exists(os.path.join(root, MANIFEST_FILE)):
        try:
            sealed = _sealed_records(root, directories[0])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            yield Damage("", os.path.join(root, MANIFEST_FILE), f"cannot be read: {error}")
            return
        for path, digest in sealed.items():
            expected = RecordedFile(package_of(path), path, _hash_field(digest), None)
            problem = _problem(path, [expected], compare_hashes=True)
            if problem is not None:
                is_record = os.path.basename(path) == "RECORD"
                yield Damage(expected.package if is_record else "", path, problem)
                records = [record for record in records if record != path]
        for record in records:
            if record not in sealed:
                yield Damage(package_of(record), record, "added: the package was installed after the venv was sealed")
        records = [record for record in records if record in sealed]
    yield from damaged_files(records, compare_hashes=True)


def _sealed_records(root: str, site_packages: str) -> dict[str, str]:
    """Return the sha256 of each RECORD, and of each file of the site hook, from the manifest."""
    with open(os.path.join(root, MANIFEST_FILE), encoding="utf-8") as file:
        records = json.load(file)["records"]
    return {
        os.path.join(site_packages, name, *(["RECORD"] if name.endswith(".dist-info") else [])): str(digest)
        for name, digest in records.items()
    }


def venvs_below(path: str) -> dict[str, str]:
    """Return label -> directory: of the venv at `path`, or of every sealed venv of the venv directory `path`.

    Raises:
        ValueError: `path` is neither.
    """
    if os.path.isfile(os.path.join(path, "pyvenv.cfg")):
        return {path: os.path.realpath(path)}
    store = os.path.join(path, ".store")
    if not os.path.isdir(store):
        raise ValueError(
            f"{path} is neither a venv (it has no pyvenv.cfg) nor a directory of venvs (it has no .store)."
        )
    digests = sorted(name for name in os.listdir(store) if _DIGEST.fullmatch(name))
    names = {os.path.basename(os.readlink(entry.path)): entry.path for entry in os.scandir(path) if entry.is_symlink()}
    links = {digest: os.path.join(store, digest) for digest in digests}
    return {names.get(digest, link): os.path.realpath(link) for digest, link in links.items()}


def remedy(packages: Iterable[str], rebuild: str) -> str:
    """Return the sentence that says how to replace damaged packages.

    Args:
        packages: names of the damaged packages.
        rebuild: what to do after the packages have left uv's cache.

    Example:
        >>> remedy(["beta", "alpha"], "build the venv again")
        'Run `uv cache clean alpha beta`, then build the venv again.'
    """
    names = sorted({package for package in packages if package})
    clean = f"`uv cache clean {' '.join(names)}`, then " if names else ""
    return f"Run {clean}{rebuild}."


def main(arguments: Sequence[str]) -> int:
    """Verify the venvs that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description="Compare every installed file of venvs with its recorded hash.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a venv, or a directory of venvs")
    code = 0
    for path in parser.parse_args(arguments).paths:
        try:
            venvs = venvs_below(path)
        except ValueError as error:
            sys.stderr.write(f"{error}\n")
            return 2
        for label, root in venvs.items():
            damages = list(verify_venv(root))
            for damage in damages:
                package = f" ({damage.package})" if damage.package else ""
                sys.stdout.write(f"{label}: {os.path.relpath(damage.path, root)}: {damage.problem}{package}\n")
            if damages:
                code = 1
                sys.stdout.write(remedy([damage.package for damage in damages], _rebuild(label, root, damages)) + "\n")
            else:
                sys.stdout.write(f"{label}: no damaged files\n")
    return code


def _rebuild(label: str, root: str, damages: Sequence[Damage]) -> str:
    if os.path.exists(os.path.join(root, MANIFEST_FILE)):
        return f"`nemo-rl venvs build --force {os.path.basename(label)}`"
    names = sorted({damage.package for damage in damages if damage.package})
    return (
        f"`uv sync {' '.join(f'--reinstall-package {name}' for name in names)}`" if names else "create the venv again"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
