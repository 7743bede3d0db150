"""What a bundle holds is compared with the lock: an altered file is never installed."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import io
import os
import shutil
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sample_projects import make_wheel, run_in, uv
from test_source_builds import make_sdist, source_files

from nemo_rl import venvs
from nemo_rl.errors import BundleError
from nemo_rl.venvs import Store, ensure
from nemo_rl.venvs.planning.plan import Package
from nemo_rl.venvs.transfer.bundle import opened_bundle, write_bundle
from nemo_rl.venvs.transfer.downloads import choose_source, download, file_name
from nemo_rl.venvs.uv import find_uv

INDEX_USER = "Basic " + base64.b64encode(b"reader:s3cret").decode()


class Index(http.server.SimpleHTTPRequestHandler):
    """A package index: a folder per package. Below /private/ it wants a password."""

    def do_GET(self) -> None:
        if self.path.startswith("/private/") and self.headers.get("Authorization") != INDEX_USER:
            self.send_error(401)
            return
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    root = tmp_path / "index"
    root.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Index, directory=str(root))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def publish(folder: Path, *files: Path) -> None:
    """Offer files as the only ones of a package."""
    folder.mkdir(parents=True, exist_ok=True)
    links = []
    for file in files:
        target = folder / file.name
        if target != file:
            shutil.copy(file, target)
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        links.append(f'<a href="{file.name}#sha256={digest}">{file.name}</a>')
    (folder / "index.html").write_text("\n".join(links))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
def project(tmp_path: Path, index: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that locks a project and returns its py_executable. uv has a cache of its own."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv_cache"))
    monkeypatch.setenv("UV_DEFAULT_INDEX", index)
    for name in ("alpha", "epsilon"):
        publish(tmp_path / "index" / name, make_wheel(files, name, "1.0", num_modules=2))
    root = tmp_path / "project"
    root.mkdir()

    def lock(*dependencies: str, uv_lines: str = "", tables: str = "") -> str:
        (root / "pyproject.toml").write_text(
            '[project]\nname = "p"\nversion = "1"\nrequires-python = ">=3.11"\n'
            f"dependencies = {list(dependencies)!r}\n[tool.uv]\npackage = false\n{uv_lines}"
            f'[[tool.uv.index]]\nurl = "{index}"\ndefault = true\n{tables}'
        )
        uv("lock", "--no-cache", cwd=root)
        return f"uv run --locked --project {root}"

    return lock


def repacked(archive: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> Path:
    """Return a copy of an archive in which `change` has replaced names and contents of regular files."""
    copy = archive.with_name("altered.tar.gz")
    with tarfile.open(archive) as source, tarfile.open(copy, "w:gz") as target:
        for entry in source:
            content = source.extractfile(entry)
            if content is None:
                target.addfile(entry)
                continue
            changed = change(entry.name, content.read())
            if changed is not None:
                entry.name, data = changed
                entry.size = len(data)
                target.addfile(entry, io.BytesIO(data))
    return copy


def names(archive: Path) -> list[str]:
    with tarfile.open(archive) as opened:
        return [entry.name for entry in opened if entry.isreg()]


def evil_wheel(wheel: bytes) -> bytes:
    """Return the wheel with other code and a RECORD that fits it."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(wheel)) as source, zipfile.ZipFile(result, "w") as target:
        evil = source.read("alpha/__init__.py").replace(b"VERSION", b"EVIL = VERSION")
        digest = base64.urlsafe_b64encode(hashlib.sha256(evil).digest()).rstrip(b"=").decode()
        for name in source.namelist():
            content = evil if name == "alpha/__init__.py" else source.read(name)
            if name.endswith("RECORD"):
                rows = content.decode().splitlines()
                kept = [row for row in rows if not row.startswith("alpha/__init__.py,")]
                content = "\n".join([f"alpha/__init__.py,sha256={digest},{len(evil)}", *kept]).encode()
            target.writestr(name, content)
    return result.getvalue()


def build(archive: Path, command: str, store: Path) -> venvs.SealedVenv:
    with opened_bundle(archive, {"A": command}, Store(store)):
        return ensure(command, "A", store=Store(store))


def test_bundle_holds_the_original_files(tmp_path: Path, project: Callable[..., str], files: Path) -> None:
    command = project("alpha", "epsilon")
    archive = tmp_path / "bundle.tar.gz"
    write_bundle({"A": command}, archive)
    expected = {hashlib.sha256(path.read_bytes()).hexdigest(): path.name for path in files.glob("*.whl")}
    assert [name for name in names(archive) if name.startswith("files/")] == sorted(
        f"files/{digest}/{name}" for digest, name in expected.items()
    )
    assert not [name for name in names(archive) if "alpha" in name and name.startswith("cache/archive")]


@pytest.mark.parametrize("how", ["content", "content and place", "removed"])
def test_altered_wheel_is_refused_before_a_build(tmp_path: Path, project: Callable[..., str], how: str) -> None:
    command = project("alpha")
    archive = tmp_path / "bundle.tar.gz"
    write_bundle({"A": command}, archive)

    def alter(name: str, content: bytes) -> tuple[str, bytes] | None:
        if "alpha" not in name:
            return name, content
        if how == "removed":
            return None
        evil = evil_wheel(content)
        place = hashlib.sha256(evil).hexdigest() if how == "content and place" else name.split("/")[1]
        return f"files/{place}/{Path(name).name}", evil

    altered = repacked(archive, alter)
    store = tmp_path / "store"
    expected = "has been altered" if how == "content" else r"No file of alpha==1\.0 has a hash of the lock"
    with pytest.raises(BundleError, match=expected):
        build(altered, command, store)
    assert Store(store).digests() == []
    assert not list(store.glob(".nemo_rl-bundle-*"))
    assert build(archive, command, store).built


def test_no_altered_entry_is_installed(tmp_path: Path, project: Callable[..., str]) -> None:
    """Each entry in turn: the build is refused, or installs what the lock says."""
    command = project("alpha", "epsilon")
    archive = tmp_path / "bundle.tar.gz"
    write_bundle({"A": command}, archive)
    for number, altered_name in enumerate(names(archive)):

        def alter(name: str, content: bytes, altered_name: str = altered_name) -> tuple[str, bytes]:
            return name, content[:-20] + b"#" * 20 if name == altered_name else content

        try:
            venv = build(repacked(archive, alter), command, tmp_path / f"store_{number}")
        except BundleError:
            continue
        assert not altered_name.startswith(("files/", "bundle.json")), altered_name
        assert run_in(venv.python, "import alpha; print(alpha.VERSION, hasattr(alpha, 'EVIL'))") == "1.0 False"


def test_cache_in_a_bundle_does_not_replace_files(tmp_path: Path, project: Callable[..., str], files: Path) -> None:
    """An attacker adds a cache of uv in which alpha is unpacked, with other code. uv would trust it."""
    command = project("alpha")
    archive = tmp_path / "bundle.tar.gz"
    write_bundle({"A": command}, archive)
    cache = tmp_path / "poisoned"
    environment = {**os.environ, "UV_CACHE_DIR": str(cache), "UV_PROJECT_ENVIRONMENT": str(tmp_path / "own")}
    sync = [find_uv(), "sync", "--frozen", "--project", str(tmp_path / "project")]
    subprocess.run(sync, env=environment, check=True, capture_output=True)
    for path in cache.rglob("alpha/__init__.py"):
        path.write_text("VERSION = '1.0'\nEVIL = 1\n")
    assert subprocess.run([*sync, "--offline", "--reinstall"], env=environment, check=False).returncode == 0
    evil = "import alpha; print(hasattr(alpha, 'EVIL'))"
    assert run_in(str(tmp_path / "own" / "bin" / "python"), evil) == "True", "the cache must be convincing"

    poisoned = tmp_path / "poisoned.tar.gz"
    with tarfile.open(archive) as source, tarfile.open(poisoned, "w:gz") as target:
        for entry in source:
            if not entry.name.startswith("cache"):
                target.addfile(entry, source.extractfile(entry) if entry.isreg() else None)
        target.add(cache, arcname="cache")
    venv = build(poisoned, command, tmp_path / "store")
    assert run_in(venv.python, evil) == "False"


def test_source_archives_and_local_packages_are_built_offline(
    tmp_path: Path, project: Callable[..., str], index: str, files: Path
) -> None:
    files.mkdir(exist_ok=True)
    make_sdist(files, "native", ("epsilon",))  # the back end of its build needs epsilon
    publish(tmp_path / "index" / "native", files / "native-1.0.tar.gz")
    local = tmp_path / "local"
    local.mkdir()
    for path, text in source_files("here", ["epsilon"]).items():
        (local / path).write_text(text)
    command = project(
        "native", "alpha", "here", tables=f'[tool.uv.sources]\nhere = {{ path = "{local}", editable = true }}\n'
    )
    archive = tmp_path / "bundle.tar.gz"
    write_bundle({"A": command}, archive)
    (tmp_path / "index").rename(tmp_path / "gone")
    venv = build(archive, command, tmp_path / "store")
    assert run_in(venv.python, "import native, here; print(native.MODULES, here.MODULES)") == "['epsilon'] ['epsilon']"

    def alter(name: str, content: bytes) -> tuple[str, bytes]:
        return name, content + b"\0" if name.endswith("native-1.0.tar.gz") else content

    with pytest.raises(BundleError, match=r"native-1\.0\.tar\.gz has sha256"):
        build(repacked(archive, alter), command, tmp_path / "other")


def test_overlay_is_built_offline(tmp_path: Path, project: Callable[..., str]) -> None:
    command = f"{project('alpha')} --with epsilon"
    archive = tmp_path / "bundle.tar.gz"
    index = write_bundle({"A": command}, archive)
    assert index.venvs == {"A": ["alpha==1.0", "epsilon==1.0"]}
    (tmp_path / "index").rename(tmp_path / "gone")
    venv = build(archive, command, tmp_path / "store")
    assert run_in(venv.python, "import alpha, epsilon; print(alpha.VERSION, epsilon.VERSION)") == "1.0 1.0"


def test_package_from_git_is_built_offline(tmp_path: Path, project: Callable[..., str]) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    for path, text in source_files("native", []).items():
        (repository / path).write_text(text)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *arguments], cwd=repository, check=True)
    command = project("alpha", f"native @ git+file://{repository}")
    archive = tmp_path / "bundle.tar.gz"
    write_bundle({"A": command}, archive)
    repository.rename(tmp_path / "gone")
    venv = build(archive, command, tmp_path / "store")
    assert run_in(venv.python, "import native; print(native.MODULES)") == "[]"


def test_index_that_serves_another_file_is_refused(tmp_path: Path, project: Callable[..., str], files: Path) -> None:
    command = project("alpha")
    wheel = tmp_path / "index" / "alpha" / "alpha-1.0-py3-none-any.whl"
    wheel.write_bytes(evil_wheel(wheel.read_bytes()))
    with pytest.raises(BundleError, match=r"No file of alpha==1\.0 has a hash of the lock: alpha-1\.0-py3"):
        write_bundle({"A": command}, tmp_path / "bundle.tar.gz")
    assert not (tmp_path / "bundle.tar.gz").exists()


def test_download_with_credentials(tmp_path: Path, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "index" / "private"
    folder.mkdir()
    (folder / "a b.whl").write_bytes(b"wheel")
    url = f"{index}private/a%20b.whl"
    with_user = url.replace("http://", "http://reader:s3cret@")
    for number, (source, variables) in enumerate(
        [
            (with_user, {}),
            (url, {"UV_DEFAULT_INDEX": with_user}),
            (url, {"UV_INDEX": f"https://other.example/ mine={with_user}"}),
            (url, {"NETRC": str(tmp_path / "netrc")}),
        ]
    ):
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login reader password s3cret\n")
        target = tmp_path / f"target_{number}"
        target.mkdir()
        with monkeypatch.context() as patch:
            for name in ("UV_DEFAULT_INDEX", "UV_INDEX", "NETRC"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            path = download(source, target)
        assert (path.name, path.parent.name) == ("a b.whl", hashlib.sha256(b"wheel").hexdigest())
    with pytest.raises(BundleError, match=r"/private/a%20b\.whl cannot be downloaded: .*401") as caught:
        download(with_user.replace("s3cret", "wr0ng"), tmp_path)
    assert "wr0ng" not in str(caught.value)
    with pytest.raises(BundleError, match="cannot be downloaded"):
        download(str(tmp_path / "absent.whl"), tmp_path)


def test_file_is_chosen_as_uv_chooses(tmp_path: Path) -> None:
    wheels = ["a-1.0-py2-none-any.whl", "a-1.0-py3-none-any.whl", "a-1.0-cp39-cp39-win_amd64.whl", "a-1.0.tar.gz"]
    urls = tuple(f"https://host/{name}#sha256=0" for name in wheels)
    assert file_name(choose_source(Package("a", "1.0", sources=urls))) == "a-1.0-py3-none-any.whl"
    assert file_name(choose_source(Package("a", "1.0", sources=urls[2:]))) == "a-1.0.tar.gz"
    assert (
        choose_source(Package("a", "1.0", sources=("/x/a-1.0-2-py3-none-any.whl", "/x/a-1.0-1-py3-none-any.whl")))[:10]
        == "/x/a-1.0-2"
    )
    with pytest.raises(BundleError, match=r"a==1\.0 cannot be bundled"):
        choose_source(Package("a", "1.0", sources=urls[2:3]))


@pytest.mark.parametrize(
    ("tables", "modules"),
    [
        ('no-build-isolation-package = ["native"]\n', "['alpha']"),
        ('[tool.uv.extra-build-dependencies]\nnative = ["epsilon"]\n', "['epsilon']"),
        ('[tool.nemo-rl]\nbuild-variables = ["FLAVOUR"]\n', "[]"),
    ],
    ids=["no isolation", "extra dependencies", "variables"],
)
def test_settings_of_builds_hold_in_a_bundle(
    tmp_path: Path,
    project: Callable[..., str],
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    tables: str,
    modules: str,
) -> None:
    monkeypatch.setenv("FLAVOUR", "mint")
    files.mkdir(exist_ok=True)
    make_sdist(files, "native")
    publish(tmp_path / "index" / "native", files / "native-1.0.tar.gz")
    is_table = tables.startswith("[")
    command = project("native", "alpha", uv_lines="" if is_table else tables, tables=tables if is_table else "")
    archive = tmp_path / "bundle.tar.gz"
    write_bundle({"A": command}, archive)
    (tmp_path / "index").rename(tmp_path / "gone")
    venv = build(archive, command, tmp_path / "store")
    seen = "{'FLAVOUR': 'mint'}" if "FLAVOUR" in tables else "{}"
    assert run_in(venv.python, "import native; print(native.MODULES, native.SEEN)") == f"{modules} {seen}"
