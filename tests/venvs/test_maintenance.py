"""List, verify and prune."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from sample_projects import Project, run_in

from nemo_rl import venvs
from nemo_rl.errors import VenvError
from nemo_rl.venvs import Store, maintenance
from nemo_rl.venvs.building.build import site_packages_of
from nemo_rl.venvs.building.site_hook import PTH_FILE
from nemo_rl.venvs.storage.layout import UNPACKED_PREFIX, remove_tree
from nemo_rl.venvs.storage.locks import LEASE_FILE, build_lock


def rewrite(path: Path, text: str) -> None:
    """Replace a file. Writing into it would also change uv's cache, because it is a hard link."""
    path.unlink()
    path.write_text(text)


def test_list_shows_names_digests_and_use(project: Project) -> None:
    one = venvs.ensure(project.command("--extra", "one"), "A")
    venvs.ensure(project.command("--extra", "one"), "B")
    two = venvs.ensure(project.command(), "C")
    with venvs.hold_lease(two.path):
        infos = {info.digest: info for info in venvs.list_venvs()}
    assert infos[one.digest[:16]].names == ("A", "B")
    assert infos[two.digest[:16]].names == ("C",)
    assert infos[one.digest[:16]].manifest == one.manifest
    assert [infos[digest[:16]].in_use for digest in (one.digest, two.digest)] == [False, True]
    assert venvs.list_venvs(Store(Path("/nowhere"))) == []


def test_verify_names_altered_files(project: Project) -> None:
    ready = venvs.ensure(project.command("--extra", "one"), "A")
    venvs.ensure(project.command(), "Untouched")
    assert venvs.verify() == []
    packages = site_packages_of(ready.path)
    (packages / "gamma" / "module_0.py").unlink()
    rewrite(packages / "beta" / "__init__.py", "VERSION = '6.6'\n")  # the same length
    rewrite(packages / "alpha" / "__init__.py", "")
    rewrite(packages / PTH_FILE, "")

    findings = {Path(finding.path).relative_to(packages.relative_to(ready.path)): finding for finding in venvs.verify()}
    assert {str(path): finding.problem.partition(":")[0] for path, finding in findings.items()} == {
        "gamma/module_0.py": "missing",
        "beta/__init__.py": "altered",
        "alpha/__init__.py": "altered",
        PTH_FILE: "altered",
    }
    assert {finding.venv for finding in findings.values()} == {"A"}
    assert venvs.verify("Untouched") == []
    assert len(venvs.verify(ready.digest)) == 4

    repaired = venvs.ensure(project.command("--extra", "one"), "A", force_rebuild=True)
    assert repaired.built
    assert venvs.verify() == []


def test_verify_finds_a_removed_package(project: Project) -> None:
    ready = venvs.ensure(project.command(), "A")
    for path in (site_packages_of(ready.path) / "alpha-1.0.dist-info").iterdir():
        path.unlink()
    (finding,) = venvs.verify("A")
    assert "alpha-1.0.dist-info" in finding.path
    assert finding.problem == "missing"


def test_verify_of_unsealed_and_missing_venvs(project: Project) -> None:
    ready = venvs.ensure(project.command(), "A")
    (ready.path / "nemo_rl_venv.json").unlink()
    (finding,) = venvs.verify("A")
    assert "not sealed" in finding.problem
    with pytest.raises(VenvError, match="'B'"):
        venvs.verify("B")


def test_prune_keeps_named_venvs(project: Project, store: Store) -> None:
    old = venvs.ensure(project.command(), "A")
    project.lock(alpha="2.0")
    new = venvs.ensure(project.command(), "A")

    planned = venvs.prune(dry_run=True)
    assert old.path.exists()
    report = venvs.prune()
    assert report.removed == planned.removed == [old.digest[:16]]
    assert report.freed_bytes == planned.freed_bytes > 0
    assert not old.path.exists()
    assert run_in(new.python, "import alpha; print(alpha.VERSION)") == "2.0"
    assert venvs.prune().removed == []


def test_prune_keeps_given_names_used_recent_and_bases(project: Project, store: Store) -> None:
    over = venvs.ensure(project.command("--extra", "one", "--with", "epsilon"), "Over")
    other = venvs.ensure(project.command(), "Other")
    assert over.manifest is not None
    base = venvs.find_sealed(str(over.manifest.base_digest))
    assert base is not None

    report = venvs.prune(keep_names=["Over"], older_than_s=3600)
    assert report.removed == []  # all were used within the hour
    hour_ago = time.time() - 4000
    for venv in (over, other, base):
        os.utime(venv.path / LEASE_FILE, (hour_ago, hour_ago))
    report = venvs.prune(keep_names=["Over"], older_than_s=3600)
    assert report.removed == [other.digest[:16]]
    assert not os.path.lexists(store.root / "Other")
    assert run_in(over.python, "import beta, epsilon; print(beta.VERSION)") == "1.0"

    report = venvs.prune(keep_names=[])
    assert sorted(report.removed) == sorted([over.digest[:16], base.digest[:16]])
    assert venvs.list_venvs() == []


@pytest.mark.parametrize("change", ["named", "used", "unnamed"])
def test_prune_decides_again_before_each_removal(
    project: Project, store: Store, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Another process may name or use a venv while `prune` deletes the files of the one before."""
    venv_of = {}
    for version in ("1.0", "2.0"):
        project.lock(alpha=version)
        venv = venvs.ensure(project.command(), "A")
        venv_of[venv.digest[:16]] = venv
        hour_ago = time.time() - 4000
        os.utime(venv.path / LEASE_FILE, (hour_ago, hour_ago))
    (store.root / "A").unlink()
    removed: list[str] = []

    def remove_and_change(path: Path) -> None:
        remove_tree(path)
        removed.append(path.name)
        if len(removed) == 1:
            (other,) = (venv for venv in venv_of.values() if venv.path.exists())
            if change == "named":
                os.symlink(os.path.relpath(store.link(other.digest), store.root), store.root / "B")
            elif change == "used":
                os.utime(other.path / LEASE_FILE)

    monkeypatch.setattr(maintenance, "remove_tree", remove_and_change)
    report = venvs.prune(older_than_s=3600)
    num_removed = 2 if change == "unnamed" else 1
    assert len(report.removed) == num_removed
    assert sum(venv.path.exists() for venv in venv_of.values()) == 2 - num_removed


def test_prune_keeps_the_venv_of_a_running_process(project: Project) -> None:
    ready = venvs.ensure(project.command("--with", "epsilon"), "A")
    worker = subprocess.Popen(
        [ready.python, "-c", "print('up', flush=True); input(); import alpha, epsilon"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "up\n"
    assert venvs.prune(keep_names=[]).removed == []
    worker.communicate("\n")
    assert worker.returncode == 0
    assert len(venvs.prune(keep_names=[]).removed) == 2  # with the base


def test_prune_respects_a_lease_until_its_release(project: Project) -> None:
    ready = venvs.ensure(project.command(), "A")
    lease = venvs.hold_lease(Path(ready.python).parent.parent)
    assert lease.path == ready.path
    assert venvs.prune(keep_names=[]).skipped == [ready.digest[:16]]
    lease.release()
    lease.release()
    assert venvs.prune(keep_names=[]).removed == [ready.digest[:16]]
    with pytest.raises(FileNotFoundError):
        venvs.hold_lease(ready.path)


def test_prune_skips_a_venv_that_is_being_built(project: Project, store: Store) -> None:
    ready = venvs.ensure(project.command(), "A")
    with build_lock(store.lock(ready.digest), "A"):
        report = venvs.prune(keep_names=[])
    assert (report.removed, report.skipped) == ([], [ready.digest[:16]])


def test_prune_removes_leftovers_of_killed_builders(project: Project, store: Store) -> None:
    ready = venvs.ensure(project.command(), "A")
    leftover = store.new_directory(ready.digest)
    foreign = store.new_directory("ab" * 32)
    for path in (leftover, foreign):
        (path / "lib").mkdir(parents=True)
        (path / "lib" / "file").write_text("x" * 5000)
    report = venvs.prune()
    assert not leftover.exists()
    assert not foreign.exists()
    assert report.freed_bytes >= 10000
    assert ready.path.exists()


def test_prune_removes_abandoned_bundles(store: Store) -> None:
    dead, alive = (store.root / f"{UNPACKED_PREFIX}{name}" for name in ("dead", "alive"))
    for path in (dead, alive):
        path.mkdir(parents=True)
        (path / "wheel").write_text("x" * 5000)
    two_days_ago = time.time() - 2 * 86400
    os.utime(dead, (two_days_ago, two_days_ago))
    assert venvs.prune(dry_run=True).freed_bytes >= 5000
    assert dead.exists()
    venvs.prune()
    assert (dead.exists(), alive.exists()) == (False, True)
