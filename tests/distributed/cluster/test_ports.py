"""Which ports are given out: never one that the kernel may give to a client socket."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
import sys
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nemo_rl.distributed.cluster import ports
from nemo_rl.distributed.cluster.ports import Block, block_range, free_ports, promised_ports
from nemo_rl.errors import ClusterError

BLOCKS = get_args(Block)


@given(st.integers(1, 65_535), st.integers(1, 65_535))
def test_band_is_outside_of_the_kernels_range(first: int, last: int) -> None:
    assume(first <= last)
    band = ports._band(first, last)
    outside = max(first - 5_000, 65_535 - max(last, 4_999))  # ports below and above it
    if band is None:
        assert outside < ports._MIN_PORTS
    else:
        assert band.stop <= first or band.start > last
        assert len(band) >= ports._MIN_PORTS
        assert band.start >= 5_000
        assert band.stop <= 65_536


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ((32_768, 60_999), (20_000, 30_000)),  # Linux
        ((49_152, 65_535), (20_000, 30_000)),  # macOS
        ((25_000, 60_000), (20_000, 25_000)),
        ((15_000, 64_000), (5_000, 15_000)),
        ((1_024, 60_999), (61_000, 65_536)),
        ((1_024, 65_535), None),
    ],
)
def test_band_for_common_kernel_ranges(kernel: tuple[int, int], expected: tuple[int, int] | None) -> None:
    band = ports._band(*kernel)
    assert (band and (band.start, band.stop)) == expected


@pytest.fixture
def blocks() -> dict[Block, range]:
    """The blocks of this machine."""
    ranges = {block: block_range(block) for block in BLOCKS}
    if None in ranges.values():
        pytest.skip("the kernel of this machine uses all ports for client sockets")
    return {block: range(low, high + 1) for block, (low, high) in ranges.items()}  # type: ignore[misc]


def test_blocks_are_disjoint(blocks: dict[Block, range]) -> None:
    for one, other in itertools.combinations(blocks.values(), 2):
        assert one.stop <= other.start or other.stop <= one.start
    assert min(map(len, blocks.values())) >= 500


@pytest.mark.parametrize("block", BLOCKS)
def test_free_ports_are_in_their_block(blocks: dict[Block, range], block: Block) -> None:
    found = free_ports(20, block=block)
    assert len(set(found)) == 20
    assert set(found) <= set(blocks[block])


def test_promised_ports_differ_between_processes(blocks: dict[Block, range]) -> None:
    code = (
        "import sys; from nemo_rl.distributed.cluster.ports import promised_ports\n"
        "print(promised_ports(5, 'agents'), flush=True); sys.stdin.read()"
    )
    with contextlib.ExitStack() as stack:
        promised = promised_ports(100, "agents")
        for _ in range(3):
            command = [sys.executable, "-c", code]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            assert process.stdout is not None
            promised += json.loads(process.stdout.readline())
        assert len(set(promised)) == 115
        assert set(promised) <= set(blocks["agents"])


def test_no_client_socket_takes_a_promised_port(blocks: dict[Block, range]) -> None:
    promised = {block: free_ports(20, block=block) for block in BLOCKS}
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server, contextlib.ExitStack() as stack:
        for _ in range(200):
            client = stack.enter_context(socket.create_connection(server.getsockname()))
            assert all(client.getsockname()[1] not in block for block in blocks.values())
        for port in itertools.chain(*promised.values()):
            stack.enter_context(socket.create_server(("", port)))


def test_assigned_ports_are_left_out(blocks: dict[Block, range]) -> None:
    block = blocks["master"]
    assert free_ports(1, taken=set(block[:-3]), block="master")[0] in block[-3:]
    with pytest.raises(ClusterError, match=f"0 free ports from {block[0]} to {block[-1]}, 1 are needed"):
        free_ports(1, taken=set(block), block="master")


def test_range_of_the_user_holds_for_every_block() -> None:
    for block in BLOCKS:
        assert set(free_ports(5, 40_000, 50_000, block=block)) <= set(range(40_000, 50_001))


def test_listener_keeps_its_port(blocks: dict[Block, range]) -> None:
    with ports.listen("127.0.0.1") as one, ports.listen("127.0.0.1") as other:
        numbers = {one.getsockname()[1], other.getsockname()[1]}
        assert len(numbers) == 2
        assert numbers <= set(blocks["endpoints"])
        assert numbers.isdisjoint(free_ports(50, block="endpoints"))
        with socket.create_connection(one.getsockname()):
            pass


def test_listening_at_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(OSError, match="assign"):
        ports.listen("192.0.2.1")


def test_kernel_chooses_where_no_range_is_safe(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    file = tmp_path / "range"
    file.write_text("1024\t65535\n")
    monkeypatch.setattr(ports, "_KERNEL_RANGE", file)
    assert block_range("master") is None
    assert len(set(free_ports(5, block="master"))) == 5
    with ports.listen("127.0.0.1") as listener:
        assert listener.getsockname()[1] > 0
