"""Transfer of a sealed venv to another store: resumption, and rejection of changed data."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pytest
from sample_projects import Project, run_in

from nemo_rl import venvs
from nemo_rl.errors import BroadcastError, VenvError
from nemo_rl.venvs import Store
from nemo_rl.venvs.planning.plan import VenvPlan
from nemo_rl.venvs.progress import PhaseClock
from nemo_rl.venvs.transfer import archive
from nemo_rl.venvs.transfer.archive import (
    Entry,
    Listing,
    Unpacker,
    decode_chunk,
    encode_chunk,
    list_venv,
    read_chunk,
)
from nemo_rl.venvs.transfer.arrival import Spool, receive_venv
from nemo_rl.venvs.uv import BuildLog


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "CHUNK_BYTES", 128)


@pytest.fixture
def built(project: Project) -> venvs.SealedVenv:
    return venvs.ensure(project.command("--extra", "one"), "a.Worker")


class _Sender:
    """Sends a venv to another store and records the requested chunks."""

    def __init__(self, built: venvs.SealedVenv, store: Store, *, stop_after: int | None = None) -> None:
        self.listing = list_venv(built.path)
        self.store = store
        self.stop_after = stop_after
        self.requested: list[int] = []

    def receive(self, venv_plan: VenvPlan, root: Path, clock: PhaseClock, log: BuildLog) -> None:
        spool = Spool(self.listing, self.store)
        try:
            receive_venv(
                venv_plan,
                root,
                clock,
                log,
                listing=self.listing,
                spool=spool,
                fetch=lambda wanted: self._fetch(wanted, spool),
                store=self.store,
                source="a test",
            )
        except BaseException:
            spool.release()  # as the kernel does for a killed process
            raise
        spool.close()

    def _fetch(self, wanted: Sequence[int], spool: Spool) -> Generator[bytes]:
        for chunk in wanted:
            if len(self.requested) == self.stop_after:
                raise BroadcastError("the connection is lost")
            self.requested.append(chunk)
            data = read_chunk(self.listing, chunk)
            spool.put(chunk, data)
            yield decode_chunk(data)


def test_received_venv_equals_the_sent_one(project: Project, built: venvs.SealedVenv, tmp_path: Path) -> None:
    other_store = Store(tmp_path / "elsewhere" / "venvs")
    sender = _Sender(built, other_store)
    arrived = venvs.ensure(project.command("--extra", "one"), "a.Worker", store=other_store, receive=sender.receive)
    assert arrived.built
    assert (arrived.digest, arrived.manifest and arrived.manifest.packages) == (
        built.digest,
        built.manifest and built.manifest.packages,
    )
    assert venvs.verify(store=other_store) == []
    assert run_in(arrived.python, "import alpha, beta, sys; print(alpha.VERSION, sys.prefix)") == f"1.0 {arrived.path}"
    assert not any(str(built.path) in text for text in _texts(arrived.path))
    # The bytecode was sent and is valid: importing writes none, although it could.
    before = {path: path.stat().st_mtime_ns for path in arrived.path.rglob("*.pyc")}
    assert any("/alpha/" in str(path) for path in before)
    run_in(arrived.python, "import alpha, beta, gamma", PYTHONDONTWRITEBYTECODE="")
    after = {path: path.stat().st_mtime_ns for path in arrived.path.rglob("*.pyc") if "_virtualenv" not in path.name}
    assert {path: time for path, time in before.items() if "_virtualenv" not in path.name} == after
    assert not list(other_store.arriving.glob("*"))


def _texts(root: Path) -> Iterator[str]:
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.suffix != ".pyc":
            yield path.read_bytes().decode("latin-1")


def test_resumed_transfer_requests_missing_chunks(project: Project, built: venvs.SealedVenv, tmp_path: Path) -> None:
    other_store = Store(tmp_path / "elsewhere")
    broken = _Sender(built, other_store, stop_after=3)
    with pytest.raises(BroadcastError, match="the connection is lost"):
        venvs.ensure(project.command("--extra", "one"), "a.Worker", store=other_store, receive=broken.receive)
    assert not other_store.builds(built.digest)
    (spool,) = other_store.arriving.iterdir()
    _, damaged, third = broken.requested
    (spool / f"{damaged:06d}").write_bytes(b"damaged meanwhile")
    again = _Sender(built, other_store)
    arrived = venvs.ensure(project.command("--extra", "one"), "a.Worker", store=other_store, receive=again.receive)
    assert again.requested == [damaged, *range(third + 1, again.listing.num_chunks)]
    assert venvs.verify(store=other_store) == []
    assert run_in(arrived.python, "import beta; print(beta.VERSION)") == "1.0"


def test_files_on_the_same_disk_are_linked(project: Project, built: venvs.SealedVenv, tmp_path: Path) -> None:
    other_store = Store(tmp_path / "elsewhere")
    venvs.ensure(
        project.command("--extra", "one"),
        "a.Worker",
        store=other_store,
        receive=_Sender(built, other_store).receive,
    )
    other = venvs.ensure(project.command("--extra", "one", "--extra", "two"), "b.Worker")
    second = _Sender(other, other_store)
    arrived = venvs.ensure(
        project.command("--extra", "one", "--extra", "two"), "b.Worker", store=other_store, receive=second.receive
    )
    linked = next(arrived.path.glob("lib/python*/site-packages/alpha/__init__.py"))
    assert linked.stat().st_nlink >= 2
    (index,) = [i for i, entry in enumerate(second.listing.entries) if entry.path.endswith("/alpha/module_0.py")]
    own_chunks = set(second.listing.chunks_of(index)[1:-1])  # the first and the last also contain parts of other files
    assert len(own_chunks) >= 3
    assert not own_chunks & set(second.requested)
    assert venvs.verify(store=other_store) == []


def test_missing_editable_package_is_named(project: Project, built: venvs.SealedVenv, tmp_path: Path) -> None:
    venv_plan = venvs.plan(project.command("--extra", "one"))
    project.root.rename(tmp_path / "moved")
    other_store = Store(tmp_path / "elsewhere")
    with pytest.raises(VenvError, match=f"sample is an editable package.*{project.root}"):
        venvs.ensure(venv_plan, "a.Worker", store=other_store, receive=_Sender(built, other_store).receive)
    assert not other_store.builds(built.digest)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../outside", "lib/../../outside", "lib//x", "./x", "", "pyvenv.cfg", "nemo_rl_venv.json"]
)
def test_path_that_leads_out_is_rejected_before_any_write(path: str, tmp_path: Path) -> None:
    entries = (Entry("lib/fine.py", 3, False, 0, None), Entry(path, 3, False, 0, None))
    with pytest.raises(BroadcastError, match="the venv is rejected"):
        Unpacker(Listing("d", "/root", entries), tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_unpacker_does_not_write_through_links(tmp_path: Path) -> None:
    root, outside = tmp_path / "venv", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    unpacker = Unpacker(Listing("d", "/root", (Entry("lib/x.py", 3, False, 0, None),)), root)
    (root / "lib" / "x.py").symlink_to(outside / "x.py")
    with pytest.raises(OSError, match="exists"):
        unpacker.feed(0, b"abc")
    assert not list(outside.iterdir())


def test_directory_link_that_leads_out_is_rejected(tmp_path: Path) -> None:
    root, outside = tmp_path / "venv", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "lib").symlink_to(outside)
    with pytest.raises(BroadcastError, match="would lead out"):
        Unpacker(Listing("d", "/root", (Entry("lib/x.py", 3, False, 0, None),)), root)


@pytest.mark.parametrize("raw", [b"", b"a" * 100, os.urandom(100)], ids=["empty", "even", "noise"])
def test_chunk_round_trip_and_rejection_of_changes(raw: bytes) -> None:
    data = encode_chunk(raw)
    assert decode_chunk(data) == raw
    for position in {0, 1, 5, len(data) - 1}:
        spoiled = bytearray(data)
        spoiled[position] ^= 0x55
        with pytest.raises(BroadcastError):
            decode_chunk(bytes(spoiled))
    with pytest.raises(BroadcastError):
        decode_chunk(data[:-1])


def test_zlib_is_used_without_zstd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_zstd", lambda: None)
    data = encode_chunk(b"abc" * 40)
    assert len(data) < 80
    assert decode_chunk(data) == b"abc" * 40


def test_changed_file_is_not_sent(built: venvs.SealedVenv) -> None:
    listing = list_venv(built.path)
    (built.path / listing.entries[0].path).write_text("")
    with pytest.raises(BroadcastError, match="has changed"):
        read_chunk(listing, 0)


def test_unused_spools_are_removed(built: venvs.SealedVenv, tmp_path: Path) -> None:
    store = Store(tmp_path / "elsewhere")
    listing = list_venv(built.path)
    earlier = Listing(listing.digest, "/another/root", listing.entries)
    earlier_spool = Spool(earlier, store)
    earlier_spool.put(0, encode_chunk(b"x"))
    used = Spool(listing, store)
    assert earlier_spool.directory.exists()  # another receiver may resume it
    earlier_spool.release()
    again = Spool(listing, store)
    assert not earlier_spool.directory.exists()
    again.release()
    used.close()


def test_end_of_a_spool_ends_waits(built: venvs.SealedVenv, tmp_path: Path) -> None:
    spool = Spool(list_venv(built.path), Store(tmp_path / "elsewhere"))
    spool.put(0, b"first")
    assert spool.wait(0, 60.0) == b"first"
    spool.end()
    assert spool.wait(1, 60.0) is None
