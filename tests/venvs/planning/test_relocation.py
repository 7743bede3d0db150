"""A venv that is built from a received source contains the driver's paths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rl.venvs import Store, ensure, plan, verify
from nemo_rl.venvs.uv import find_uv

_BACKEND = """\
import base64, hashlib, os, zipfile

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    files = {
        "sent.pth": os.getcwd() + "\\n",
        "sent-1.0.dist-info/METADATA": "Metadata-Version: 2.1\\nName: sent\\nVersion: 1.0\\n",
        "sent-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\\nGenerator: b\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    lines = []
    with zipfile.ZipFile(os.path.join(wheel_directory, "sent-1.0-py3-none-any.whl"), "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(text)}")
        wheel.writestr("sent-1.0.dist-info/RECORD", "\\n".join([*lines, "sent-1.0.dist-info/RECORD,,"]))
    return "sent-1.0-py3-none-any.whl"
"""


def test_venv_of_a_received_source_equals_the_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, target = tmp_path / "project", tmp_path / "source" / "0123"
    root.mkdir()
    (root / "pyproject.toml").write_text(
        '[project]\nname = "sent"\nversion = "1.0"\nrequires-python = ">=3.11"\n'
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (root / "backend.py").write_text(_BACKEND)
    lock = [find_uv(), "lock", "--quiet", "--offline", "--python", sys.executable, "--project", str(root)]
    subprocess.run(lock, check=True)
    spec = f"uv run --locked --project {root}"
    planned = plan(spec, store=Store(tmp_path / "drivers"))
    target.parent.mkdir()
    root.rename(target)
    monkeypatch.setenv("NEMO_RL_SOURCES", json.dumps({str(root): str(target)}))
    store = Store(tmp_path / "nodes")
    assert plan(spec, store=store).digest == planned.digest
    sealed = ensure(planned, "sent.Worker", store=store)
    (pth,) = Path(sealed.python).parent.parent.glob("lib/python*/site-packages/sent.pth")
    assert pth.read_text() == f"{root}\n"
    assert str(target) not in (pth.parent / "sent-1.0.dist-info" / "direct_url.json").read_text()
    assert verify(store=store) == []


_BUILD = {
    "a path": '[build-system]\nrequires = ["uv_build>=0.9,<0.15"]\nbuild-backend = "uv_build"\n',
    "a finder of setuptools": (
        '[build-system]\nrequires = ["setuptools>=77"]\nbuild-backend = "setuptools.build_meta"\n'
        '[tool.setuptools]\npackages = ["edited"]\npackage-dir = { edited = "src/edited" }\n'
    ),
}


@pytest.mark.parametrize("link", _BUILD)
def test_edited_code_at_another_path_uses_the_same_venv(
    link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "venvs")
    digests, outputs = [], []
    for number in ("1", "2"):
        upload = tmp_path / f"upload_{number}"
        package = upload / "src" / "edited"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"CODE = {number}\n")
        (upload / "pyproject.toml").write_text(
            f'[project]\nname = "edited"\nversion = "1.0"\nrequires-python = ">=3.11"\n{_BUILD[link]}'
        )
        lock = [find_uv(), "lock", "--quiet", "--python", sys.executable, "--project", str(upload)]
        subprocess.run(lock, check=True)
        monkeypatch.setenv("NEMO_RL_SOURCES", json.dumps({"/uploaded/edited": str(upload)}))
        venv = ensure(plan(f"uv run --locked --project {upload}", store=store), "edited.Worker", store=store)
        overlay = ensure(
            plan(f"uv run --locked --project {upload} --with iniconfig==2.1.0", store=store), "overlay", store=store
        )
        digests.append((venv.digest, overlay.digest))
        for python in (venv.python, overlay.python):
            code = "import edited; print(edited.CODE, edited.__file__)"
            done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
            outputs.append(done.stdout.strip())
    first, second = tmp_path / "upload_1", tmp_path / "upload_2"
    assert outputs == [f"1 {first}/src/edited/__init__.py"] * 2 + [f"2 {second}/src/edited/__init__.py"] * 2
    assert digests[0] == digests[1]
    assert verify(store=store) == []
