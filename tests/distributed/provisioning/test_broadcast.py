"""Broadcast of venvs: real uv and Ray, nodes with separate stores and caches, and an index that records requests."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from package_index import Index, make_project, make_wheel, served
from ray.cluster_utils import Cluster

from nemo_rl import venvs
from nemo_rl.distributed import node_venvs
from nemo_rl.distributed.cluster.nodes import alive_nodes
from nemo_rl.distributed.node_venvs import NodeProgress, ensure_venv_on_node, ensure_venvs_on_each_node
from nemo_rl.distributed.provisioning.broadcast import BroadcastCoordinator
from nemo_rl.distributed.provisioning.broadcast_peer import CONCURRENCY_GROUPS, BroadcastPeer, UpstreamPeer, _Upstream
from nemo_rl.errors import BroadcastError
from nemo_rl.venvs import Store
from nemo_rl.venvs.storage.manifest import read_manifest
from nemo_rl.venvs.transfer.archive import CHUNK_BYTES, Listing, decode_chunk
from nemo_rl.venvs.uv import find_uv

_BIG = 3 * CHUNK_BYTES


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    folder = tmp_path_factory.mktemp("index")
    make_wheel(folder, "big", num_bytes=_BIG)
    make_wheel(folder, "small")
    with served(folder) as running:
        yield running


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, index: Index) -> str:
    return make_project(tmp_path_factory.mktemp("p") / "project", index.url, "big==1.0", {"more": "small==1.0"})


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One directory per node, as its disk, for the nodes other than the driver's."""
    return [tmp_path_factory.mktemp("disk") for _ in range(2)]


def _on(disk: Path) -> dict[str, str]:
    """Return the variables that put a node's venvs and uv cache on a disk."""
    return {"NEMO_RL_VENV_DIR": str(disk / "venvs"), "UV_CACHE_DIR": str(disk / "cache")}


@pytest.fixture(scope="module")
def cluster(start_nodes: Callable[..., Cluster], disks: list[Path]) -> Cluster:
    """The driver's node, and one node per disk."""
    return start_nodes({"num_cpus": 1}, *({"num_cpus": 1, "env_vars": _on(disk)} for disk in disks))


@pytest.fixture(autouse=True)
def driver_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Cluster, index: Index, disks: list[Path]
) -> Path:
    """The disk of the driver's node. The driver does not set the venv directory of the other nodes, which is empty."""
    for name in ("NRL_FORCE_REBUILD_VENVS", "NEMO_RL_VENV_DIR", "NEMO_RL_VENV_SPREAD", "UV_PYTHON", "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NEMO_RL_PROJECT_ROOT", str(tmp_path))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    _reset(disks)
    index.requests.clear()
    return tmp_path / "venvs"


def _reset(disks: list[Path]) -> None:
    """Simulate a new driver, and nodes without venvs."""
    node_venvs._ready.clear()
    for path in (path for disk in disks for path in disk.iterdir()):
        shutil.rmtree(path)


def _driver_node() -> str:
    return ray.get_runtime_context().get_node_id()


def _store(python: str) -> Store:
    return Store(Path(python).parent.parent.parent)


@pytest.mark.slow
def test_one_node_builds_and_the_others_receive(project: str, index: Index, driver_disk: Path) -> None:
    report = ensure_venvs_on_each_node({"a.Worker": project, "b.Worker": f"{project} --extra more"})
    assert sorted(index.wheels()) == ["big-1.0-py3-none-any.whl", "small-1.0-py3-none-any.whl"]
    assert len(report.entries) == 6
    for entry in report.entries:
        is_driver = entry.python.startswith(str(driver_disk))
        assert (entry.built, bool(entry.received_from)) == (is_driver, not is_driver)
    for entry in report.of("b.Worker"):
        store = _store(entry.python)
        assert venvs.verify(store=store) == []
        # The received script starts the interpreter of the received venv.
        script = Path(entry.python).with_name("small-say")
        output = subprocess.run([script], check=True, capture_output=True, text=True).stdout.split()
        assert output == ["small", os.path.realpath(Path(entry.python).parent.parent)]
        # Files of the first venv are hard-linked into the second one.
        assert os.stat(next(store.directory.glob("*.*/lib/python*/site-packages/big/data.bin"))).st_nlink >= 2
        assert not list(store.arriving.glob("*/*"))
        assert list(Path(entry.python).parent.parent.glob("lib/python*/site-packages/big/__pycache__/*.pyc"))


@pytest.mark.slow  # builds a venv for each node
def test_every_node_builds_when_broadcast_is_off(project: str, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_RL_VENV_SPREAD", "off")
    report = ensure_venvs_on_each_node({"a.Worker": project})
    assert [entry.built for entry in report.entries] == [True] * 3
    assert index.wheels() == ["big-1.0-py3-none-any.whl"] * 3


def test_additive_venv_is_received_with_its_base(project: str, index: Index) -> None:
    additive = f"{project} --with small==1.0"
    ensure_venv_on_node(_driver_node(), additive, "a.Worker")
    index.requests.clear()
    received = ensure_venvs_on_each_node({"a.Worker": additive}).entries[1]
    assert index.requests == []
    assert received.received_from
    code = "import big, small; print(big.NAME, small.NAME)"
    output = subprocess.run([received.python, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.split() == ["big", "small"]
    for name in ("big", "small"):
        script = Path(received.python).with_name(f"{name}-say")
        assert subprocess.run([script], check=True, capture_output=True, text=True).stdout.split()[0] == name


@pytest.mark.slow
def test_node_that_joins_later_receives(
    project: str, index: Index, cluster: Cluster, disks: list[Path], tmp_path: Path
) -> None:
    ensure_venvs_on_each_node({"a.Worker": project})
    index.requests.clear()
    node = cluster.add_node(num_cpus=1, env_vars=_on(tmp_path / "later"))
    try:
        assert ensure_venv_on_node(node.node_id, project, "a.Worker").received_from
    finally:
        cluster.remove_node(node)
    _reset(disks)
    other = next(node.node_id for node in alive_nodes() if node.node_id != _driver_node())
    assert ensure_venv_on_node(other, project, "a.Worker").received_from  # a new driver checks its own store
    assert index.requests == []


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="only an x86_64 kernel can report another machine")
def test_each_platform_has_a_builder(index: Index, cluster: Cluster, tmp_path: Path) -> None:
    """Add two nodes whose processes see another machine than x86_64 in uname."""
    both = "big==1.0\", \"small==1.0 ; platform_machine == 'i686'"
    project = make_project(tmp_path / "project", index.url, both, {})
    index.requests.clear()
    native = {node.node_id for node in alive_nodes()}
    with _processes_see_i686():
        others = [cluster.add_node(num_cpus=1, env_vars=_on(tmp_path / name)) for name in ("one", "two")]
    try:
        entries = ensure_venvs_on_each_node({"a.Worker": project}).entries
    finally:
        for node in others:
            cluster.remove_node(node)
    groups = [[e for e in entries if (e.node_id in native) is is_native] for is_native in (True, False)]
    assert [len(group) for group in groups] == [3, 2]
    for group, machine, packages in zip(groups, ("x86_64", "i686"), ({"big"}, {"big", "small"})):
        assert [entry.built for entry in group].count(True) == 1
        assert all(entry.built or entry.received_from for entry in group)
        for entry in group:
            manifest = read_manifest(Path(os.path.realpath(Path(entry.python).parent.parent)))
            assert manifest.platform.split("-")[1] == machine
            assert {package.partition("==")[0] for package in manifest.packages} == packages
    assert len({entry.digest for entry in entries}) == 2
    assert sorted(wheel.partition("-")[0] for wheel in index.wheels()) == ["big", "big", "small"]


@contextlib.contextmanager
def _processes_see_i686() -> Iterator[None]:
    """Make the kernel report an i686 machine to processes that start in the block, and to their children."""
    personality = ctypes.CDLL(None, use_errno=True).personality
    before = personality(0xFFFFFFFF)
    assert personality(before | 0x0008) != -1, "the kernel rejects PER_LINUX32"
    try:
        yield
    finally:
        personality(before)


@pytest.mark.slow
def test_altered_venv_is_rejected_and_built_locally(
    project: str, index: Index, caplog: pytest.LogCaptureFixture
) -> None:
    first = ensure_venv_on_node(_driver_node(), project, "a.Worker")
    (altered,) = Path(first.python).parent.parent.glob("lib/python*/site-packages/big/data.bin")
    content = bytearray(altered.read_bytes())
    content[-1] ^= 1
    altered.write_bytes(content)
    index.requests.clear()
    other = next(node.node_id for node in alive_nodes() if node.node_id != _driver_node())
    entry = ensure_venv_on_node(other, project, "a.Worker")
    assert (entry.built, entry.received_from) == (True, "")
    assert index.wheels() == ["big-1.0-py3-none-any.whl"]
    assert "data.bin does not match the hash in its package's RECORD" in caplog.text
    assert venvs.verify(store=_store(entry.python)) == []


@pytest.mark.slow
def test_dead_receiver_does_not_block_others(project: str, index: Index, cluster: Cluster, tmp_path: Path) -> None:
    others = {node.node_id for node in alive_nodes()} - {_driver_node()}
    uv = tmp_path / "uv-wrapper"
    uv.write_text(f'#!/bin/sh\nif [ "$1" = venv ]; then sleep 600; fi\nexec {find_uv()} "$@"\n')
    uv.chmod(uv.stat().st_mode | stat.S_IXUSR)
    doomed = cluster.add_node(num_cpus=1, env_vars=_on(tmp_path / "doomed") | {"NEMO_RL_UV": str(uv)})
    killed: list[str] = []

    def kill_node(event: NodeProgress) -> None:
        if event.node_id == doomed.node_id and event.event.phase == "fetch" and not killed:
            killed.append(event.node_id)
            cluster.remove_node(doomed, allow_graceful=False)

    report = ensure_venvs_on_each_node({"a.Worker": project}, progress=kill_node)
    assert killed
    assert {entry.node_id for entry in report.entries if entry.received_from} == others
    assert index.wheels() == ["big-1.0-py3-none-any.whl"]


def test_chunks_come_from_the_next_peer_after_a_failure(project: str) -> None:
    class DamagingPeer:
        """A peer that sends damaged chunks."""

        def chunk(self, key: str, chunk: int) -> bytes:
            return b"z" + bytes(100)

    python = ensure_venv_on_node(_driver_node(), project, "a.Worker").stable_python
    remote: Any = ray.remote
    peer = remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS)(BroadcastPeer)
    source, dead, damaging = peer.remote(), peer.remote(), remote(num_cpus=0)(DamagingPeer).remote()
    (listing,) = ray.get(source.offer.remote(python))
    assert isinstance(listing, Listing)
    ray.kill(dead)
    chunks = list(range(listing.num_chunks))
    assert len(chunks) >= 3
    upstream = _Upstream(
        [UpstreamPeer("dead", dead), UpstreamPeer("damaging", damaging), UpstreamPeer("source", source)]
    )
    encoded: dict[int, bytes] = {}
    raw = b"".join(upstream.fetch(listing.key, chunks, encoded.__setitem__))
    assert len(raw) == sum(entry.size for entry in listing.entries)
    assert b"".join(decode_chunk(encoded[chunk]) for chunk in chunks) == raw
    with pytest.raises(BroadcastError, match="damaging.*sha256 does not match"):
        list(_Upstream([UpstreamPeer("damaging", damaging)]).fetch(listing.key, chunks[:1], encoded.__setitem__))
    for actor in (source, damaging):
        ray.kill(actor)


def test_one_node_builds_for_each_platform() -> None:
    addresses = {name: name for name in ("x1", "x2", "arm1", "arm2", "driver")}
    broadcast = BroadcastCoordinator({}, addresses, "driver")
    x86, arm = ("digest", "x86_64"), ("digest", "aarch64")
    assert broadcast.assign(x86, "driver", ["w"]) is None
    assert broadcast.assign(arm, "arm1", ["w"]) is None
    assert broadcast.assign(x86, "x1", ["w"]) == "driver"
    assert broadcast.assign(arm, "arm2", ["w"]) == "arm1"
    # The builder of one platform is lost: only nodes of that platform need another.
    assert broadcast.remove_node("arm1") == {"arm2": ["w"]}
    assert broadcast.assign(arm, "arm2", ["w"]) is None
    # The other builder fails: the nodes that wait for it are returned.
    assert broadcast.fail_build(x86, "driver") == {"x1": ["w"]}
    assert broadcast.assign(x86, "x2", ["w"]) is None  # it does not wait for a failed builder
