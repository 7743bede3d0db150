"""Changed wheels of a package index, and the secrecy of its credentials. Uses an HTTP server on loopback."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from sample_projects import make_wheel, run_in, uv

from nemo_rl.errors import VenvBuildError
from nemo_rl.venvs import Store, ensure, plan

SECRET = "registry-secret-4711"


@dataclass
class Registry:
    """A package index that records credentials, and the command lines that all users can see during each request."""

    root: Path
    url: str = ""
    authorizations: list[str] = field(default_factory=list)
    command_lines: list[str] = field(default_factory=list)

    def publish(self, *, num_modules: int) -> None:
        """Replace the wheel of alpha 1.0."""
        wheel = make_wheel(self.root / "alpha", "alpha", "1.0", num_modules=num_modules)
        sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}#sha256={sha256}">{wheel.name}</a>')


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    index = Registry(tmp_path / "registry")
    index.publish(num_modules=1)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, directory=str(index.root), **options)  # type: ignore[arg-type]

        def do_GET(self) -> None:
            index.authorizations.append(self.headers.get("Authorization", ""))
            for process in psutil.process_iter(["cmdline"]):
                index.command_lines.append(" ".join(process.info["cmdline"] or ()))
            super().do_GET()

        def log_message(self, *arguments: object) -> None: ...

    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        index.url = f"127.0.0.1:{server.server_port}"
        yield index
        server.shutdown()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def lock(root: Path, index: str) -> str:
    (root / "pyproject.toml").write_text(
        '[project]\nname = "p"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["alpha"]\n'
        f'[tool.uv]\npackage = false\n[[tool.uv.index]]\nname = "mine"\nurl = "{index}"\ndefault = true\n'
    )
    uv("lock", "--no-cache", cwd=root)
    return f"uv run --locked --project {root}"


def test_wheel_that_differs_from_the_lock_is_rejected(registry: Registry, root: Path, store: Store) -> None:
    command = lock(root, f"http://{registry.url}/")
    registry.publish(num_modules=5)
    with pytest.raises(VenvBuildError, match="(?i)hash mismatch"):
        ensure(command, "worker")
    assert "worker" not in store.names()


def test_changed_wheel_of_an_additive_venv_is_rejected(
    registry: Registry, root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "pyproject.toml").write_text('[project]\nname = "p"\nversion = "1"\nrequires-python = ">=3.11"\n')
    uv("lock", cwd=root)
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://{registry.url}/")
    venv_plan = plan(f"uv run --locked --project {root} --with alpha==1.0")
    registry.publish(num_modules=5)
    with pytest.raises(VenvBuildError, match="(?i)hash mismatch"):
        ensure(venv_plan, "worker")
    assert "worker" not in store.names()


def test_index_credentials_reach_only_the_index(
    registry: Registry, root: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = lock(root, f"http://{registry.url}/")
    monkeypatch.setenv("UV_INDEX_MINE_USERNAME", "me")
    monkeypatch.setenv("UV_INDEX_MINE_PASSWORD", SECRET)
    registry.authorizations.clear()
    registry.command_lines.clear()
    built = ensure(command, "worker")
    assert run_in(built.python, "import alpha; print(alpha.VERSION)") == "1.0"
    assert_credentials_are_secret(registry, store)


def test_url_credentials_reach_only_the_index(registry: Registry, root: Path, store: Store) -> None:
    (root / "pyproject.toml").write_text('[project]\nname = "p"\nversion = "1"\nrequires-python = ">=3.11"\n')
    uv("lock", cwd=root)
    address = f"http://me:{SECRET}@{registry.url}/alpha/alpha-1.0-py3-none-any.whl"
    built = ensure(f"uv run --locked --project {root} --with 'alpha @ {address}'", "worker")
    assert run_in(built.python, "import alpha; print(alpha.VERSION)") == "1.0"
    assert_credentials_are_secret(registry, store)


def assert_credentials_are_secret(registry: Registry, store: Store) -> None:
    assert any(value.startswith("Basic ") for value in registry.authorizations), "the secret has to have been used"
    assert any("uv" in line for line in registry.command_lines), "uv must have been seen while it ran"
    assert not [line for line in registry.command_lines if SECRET in line], "in a command line, where `ps` shows it"
    files = [path for path in store.root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.suffix == ".log" for path in files)
    assert [str(path) for path in files if SECRET.encode() in path.read_bytes()] == []
