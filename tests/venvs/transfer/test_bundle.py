"""Bundles: written with access to a package index, and used without one."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from sample_projects import make_wheel, run_in, uv

from nemo_rl.errors import BundleError
from nemo_rl.venvs import Store, ensure
from nemo_rl.venvs.transfer.bundle import opened_bundle, read_index, write_bundle

REPOSITORY = Path(__file__).resolve().parents[3]


def publish(wheel: Path) -> None:
    """Replace the wheel of this package in the index."""
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    link = f'<a href="{wheel.name}#sha256={sha256}">{wheel.name}</a>'
    (wheel.parent / "index.html").write_text(link)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """A package index over HTTP on loopback with alpha, and beta, which needs alpha."""
    root = tmp_path / "registry"
    for name, requires in (("alpha", ()), ("beta", ("alpha",))):
        wheel = make_wheel(root / name, name, "1.0", requires=requires, num_modules=3)
        publish(wheel)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def command(tmp_path: Path, registry: str) -> str:
    """The py_executable of a project that depends on beta from the index."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "pyproject.toml").write_text(
        '[project]\nname = "p"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["beta"]\n'
        '[project.optional-dependencies]\nmore = ["alpha"]\n'
        f'[tool.uv]\npackage = false\n[[tool.uv.index]]\nurl = "{registry}"\ndefault = true\n'
    )
    uv("lock", "--no-cache", cwd=root)  # the cache may hold another test's index with the same port
    return f"uv run --locked --project {root}"


def without_a_network() -> list[str]:
    """Return the prefix of a command that runs in a network namespace without routes. Skips if that is not possible."""
    for prefix in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
                return prefix
    pytest.skip("cannot create a network namespace on this machine")


def test_bundle_builds_without_a_network_route(tmp_path: Path, command: str, registry: str) -> None:
    prefix, archive = without_a_network(), tmp_path / "bundle.tar.gz"
    env = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    env |= {"NEMO_RL_VENV_DIR": str(tmp_path / "store"), "NEMO_RL_PROJECT_ROOT": str(tmp_path / "project")}
    env |= {"PYTHONPATH": str(REPOSITORY), "UV_CACHE_DIR": str(tmp_path / "empty")}

    def run(*arguments: str, where: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        cli = [*where, sys.executable, "-m", "nemo_rl.cli", "venvs", *arguments, "--json"]
        return subprocess.run(cli, env=env, capture_output=True, text=True, check=False)

    written = run("bundle", "base", "--output", str(archive))
    assert written.returncode == 0, written.stderr
    assert json.loads(written.stdout)["venvs"] == {"base": ["alpha==1.0", "beta==1.0"]}
    look = f"import urllib.request as u; u.urlopen({registry!r}, timeout=5)"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0
    assert subprocess.run([*prefix, sys.executable, "-c", look], capture_output=True, check=False).returncode != 0
    assert run("build", "base", "--offline", where=prefix).returncode == 1, "the build has to need the bundle"
    process = run("build", "base", "--offline", "--from-bundle", str(archive), where=prefix)
    assert process.returncode == 0, process.stderr
    python = json.loads(process.stdout)[0]["python"]
    assert run_in(python, "import alpha, beta; print(alpha.VERSION, beta.VERSION)") == "1.0 1.0"
    assert not list((tmp_path / "store").glob(".nemo_rl-bundle-*")), "the unpacked cache stays behind"


def test_bundle_of_another_lock_is_rejected(tmp_path: Path, command: str, registry: str) -> None:
    archive = tmp_path / "bundle.tar.gz"
    write_bundle({"worker": command}, archive)
    root = tmp_path / "registry" / "alpha"
    publish(make_wheel(root, "alpha", "2.0"))
    uv("lock", "--upgrade", "--no-cache", cwd=tmp_path / "project")
    with (
        pytest.raises(BundleError, match=r"alpha 1\.0 -> 2\.0"),
        opened_bundle(archive, {"worker": command}, Store(tmp_path / "store")),
    ):
        pass


def test_unwritable_archive_is_rejected_before_a_build(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    never = {"p": "uv run --locked --project /nowhere"}
    for archive, why in ((tmp_path, "is not a regular file"), (tmp_path / "file" / "b.tar.gz", "cannot be written")):
        with pytest.raises(BundleError, match=why):
            write_bundle(never, archive)
    with pytest.raises(BundleError, match="nothing to bundle"):
        write_bundle({}, tmp_path / "b.tar.gz")


def test_bundle_for_another_python_is_rejected(tmp_path: Path) -> None:
    archive = forged(tmp_path, python="3.9")
    with pytest.raises(BundleError, match=r"for Python 3\.9"), opened_bundle(archive, {}, Store(tmp_path / "store")):
        pass


@pytest.mark.parametrize(
    ("name", "link"),
    [("/etc/evil", None), ("../evil", None), ("cache/../../evil", None), ("cache/l", "/etc"), ("cache/l", "../../x")],
)
def test_bundle_that_leads_out_is_unsafe(tmp_path: Path, name: str, link: str | None) -> None:
    entry = tarfile.TarInfo(name)
    if link is not None:
        entry.type, entry.linkname = tarfile.SYMTYPE, link
    archive = forged(tmp_path, extra=entry)
    with (
        pytest.raises(BundleError, match="not safe to unpack"),
        opened_bundle(archive, {}, Store(tmp_path / "store")),
    ):
        pass
    assert not (tmp_path / "evil").exists()
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".gitignore"], "nothing was unpacked"


def test_incomplete_bundle_is_rejected(tmp_path: Path, command: str) -> None:
    archive = tmp_path / "bundle.tar.gz"
    write_bundle({"worker": command}, archive)
    (tmp_path / "cut.tar.gz").write_bytes(archive.read_bytes()[:-2000])
    with (
        pytest.raises(BundleError, match="incomplete or damaged"),
        opened_bundle(tmp_path / "cut.tar.gz", {"worker": command}, Store(tmp_path / "store")),
    ):
        pass
    (tmp_path / "none.tar.gz").write_text("no archive")
    with pytest.raises(BundleError, match="cannot be read"):
        read_index(tmp_path / "none.tar.gz")


def test_build_from_a_bundle_restores_the_environment(tmp_path: Path, command: str) -> None:
    archive = tmp_path / "bundle.tar.gz"
    write_bundle({"worker": command}, archive)
    store, before = Store(tmp_path / "store"), dict(os.environ)
    with opened_bundle(archive, {"worker": command}, store):
        assert ensure(command, "worker", store=store).built
    assert dict(os.environ) == before


def forged(folder: Path, *, python: str | None = None, extra: tarfile.TarInfo | None = None) -> Path:
    """Write an archive that starts like a bundle for this machine."""
    index = {
        "python": python or f"{sys.version_info.major}.{sys.version_info.minor}",
        "platform": f"{sys.platform}-{platform.machine()}",
        "venvs": {},
        "num_bytes": 0,
        "format": 1,
    }
    content = json.dumps(index).encode()
    with tarfile.open(folder / "forged.tar.gz", "w:gz") as archive:
        first = tarfile.TarInfo("bundle.json")
        first.size = len(content)
        archive.addfile(first, io.BytesIO(content))
        if extra is not None:
            archive.addfile(extra)
    return folder / "forged.tar.gz"
