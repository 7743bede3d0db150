"""A user's machine: the wheel of this package, uv and Python, and no clone."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from nemo_rl.venvs.uv import find_uv

REPOSITORY = Path(__file__).resolve().parents[2]
# Variables that would let a project find the clone or the packages of the tests.
_OF_THE_TESTS = ("NEMO_RL_", "NRL_", "UV_", "PYTHON", "RAY_", "VIRTUAL_ENV", "PYTEST_", "CONDA_")


@dataclass(frozen=True)
class Machine:
    """Runs commands in directories below `folder`, with a clean environment.

    Attributes:
        wheel: the wheel of this package.
        env: all variables of the commands.
    """

    folder: Path
    wheel: Path
    env: dict[str, str]

    @staticmethod
    def set_up(folder: Path, **env: str) -> Machine:
        """Build the wheel; `env` is added to the variables of the commands."""
        uv = find_uv()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THE_TESTS)}
        command = [uv, "build", "--wheel", "--quiet", "--out-dir", str(folder / "wheels"), str(REPOSITORY)]
        subprocess.run(command, check=True, env=kept, cwd=folder)
        (wheel,) = (folder / "wheels").glob("*.whl")
        (folder / "bin").mkdir()
        for program in (Path(uv), Path(uv).with_name("uvx")):
            (folder / "bin" / program.name).symlink_to(program)
        python = Path(sys.executable).resolve().parent
        return Machine(folder, wheel, {**kept, "PATH": f"{folder}/bin:{python}:/usr/bin:/bin", **env})

    def run(self, directory: Path, *words: str, **env: str) -> str:
        """Run a command and return its standard output. Fails with all its output."""
        done = subprocess.run(
            words,
            cwd=directory,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def write(self, path: str, text: str) -> Path:
        """Write a file below the folder."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target
