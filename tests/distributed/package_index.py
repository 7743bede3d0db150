"""A package index over HTTP on loopback that records requests, with wheels of a known size."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from nemo_rl.venvs.uv import find_uv


@dataclass
class Index:
    """A running index: its URL and the requested paths."""

    url: str
    requests: list[str] = field(default_factory=list)

    def wheels(self) -> list[str]:
        """Return the names of the requested wheels, one per request."""
        return [path.rpartition("/")[2] for path in self.requests if path.endswith(".whl")]


def make_wheel(folder: Path, name: str, *, num_bytes: int = 0, seed: int = 0) -> None:
    """Write a wheel, version 1.0, with a console script and `num_bytes` of data, half of them incompressible."""
    folder = folder / name
    folder.mkdir(parents=True)
    info = f"{name}-1.0.dist-info"
    noise = hashlib.shake_256(f"{name}{seed}".encode()).digest(num_bytes // 2)
    files = {
        f"{name}/__init__.py": f"NAME = {name!r}\ndef main():\n    import sys\n    print(NAME, sys.prefix)\n".encode(),
        f"{name}/data.bin": noise + bytes(num_bytes - len(noise)),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name}-say = {name}:main\n".encode(),
    }
    record = []
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{path},sha256={digest},{len(content)}")
        archive.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/RECORD,,"]) + "\n")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (folder / "index.html").write_text(f'<a href="{wheel.name}#sha256={sha256}">{wheel.name}</a>')


@contextmanager
def served(folder: Path) -> Iterator[Index]:
    """Serve the packages in `folder` on a loopback port while the block runs."""
    index = Index("")

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            index.requests.append(self.path)
            super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    index.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield index
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def make_project(root: Path, url: str, dependencies: str, extras: dict[str, str]) -> str:
    """Write and lock a project whose packages come from the index at `url`; return its py_executable."""
    root.mkdir()
    lines = "".join(f'{name} = ["{package}"]\n' for name, package in extras.items())
    (root / "pyproject.toml").write_text(
        f'[project]\nname = "sample"\nversion = "0"\nrequires-python = ">=3.11"\ndependencies = ["{dependencies}"]\n'
        f"[project.optional-dependencies]\n{lines}[tool.uv]\npackage = false\n"
        f'[[tool.uv.index]]\nurl = "{url}"\ndefault = true\n'
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "VIRTUAL_ENV"))}
    command = [find_uv(), "lock", "--quiet", "--no-cache", "--python", sys.executable]
    subprocess.run(command, cwd=root, check=True, env=environment)
    return f"uv run --locked --project {root}"
