"""Receive a venv from another node: keep its chunks on disk, unpack them, and serve them to other nodes.

::

    other node ── fetch ─► Spool (one file per checked chunk) ─► Unpacker ─► new venv directory ─► check, seal
                                   └── wait ─► nodes that receive from this one

The spool outlives a receiver that is killed, so chunks that have arrived are not sent again. It is removed when all
nodes have the venv.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from nemo_rl.errors import BroadcastError, VenvError
from nemo_rl.venvs.planning.plan import VenvPlan
from nemo_rl.venvs.planning.relocation import located
from nemo_rl.venvs.progress import PhaseClock
from nemo_rl.venvs.storage.layout import DIGEST_PREFIX, Store, remove_tree
from nemo_rl.venvs.storage.locks import LEASE_FILE, hold_lease, unused
from nemo_rl.venvs.storage.manifest import BrokenManifestError, read_manifest
from nemo_rl.venvs.transfer.archive import Listing, Unpacker, decode_chunk
from nemo_rl.venvs.uv import BuildLog, is_no_space, no_space_error, run_uv

_ABANDONED_S = 86400.0

# Yields the raw bytes of the given chunks in this order, after it has checked each and put it into the spool.
Fetch = Callable[[Sequence[int]], Generator[bytes]]


class Spool:
    """Keeps the chunks of one stream that have arrived on this node, for its own venv and for other nodes.

    The constructor finds the chunks of an earlier receiver and removes broken ones. It also removes unused spools: old
    ones, and those of other streams of the same venv.
    """

    def __init__(self, listing: Listing, store: Store) -> None:
        name = f"{listing.digest[:DIGEST_PREFIX]}.{listing.key[:DIGEST_PREFIX]}"
        self.directory = store.arriving / name
        self._changed = threading.Condition()
        self._ended = False
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        (self.directory / LEASE_FILE).touch()
        self._lease = hold_lease(self.directory)
        _remove_abandoned(self.directory)
        self._arrived = {chunk for chunk in range(listing.num_chunks) if self._is_valid(chunk)}

    def _path(self, chunk: int) -> Path:
        return self.directory / f"{chunk:06d}"

    def _is_valid(self, chunk: int) -> bool:
        try:
            decode_chunk(self._path(chunk).read_bytes())
        except FileNotFoundError:
            return False
        except BroadcastError:
            self._path(chunk).unlink()
            return False
        return True

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._arrived

    def put(self, chunk: int, data: bytes) -> None:
        """Store an encoded chunk, which the caller has checked."""
        temporary = self._path(chunk).with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(data)
        os.replace(temporary, self._path(chunk))
        with self._changed:
            self._arrived.add(chunk)
            self._changed.notify_all()

    def read(self, chunk: int) -> bytes:
        """Return an encoded chunk that has arrived."""
        return self._path(chunk).read_bytes()

    def end(self) -> None:
        """Declare that no more chunks will arrive; ends every `wait`."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self, chunk: int, timeout_s: float) -> bytes | None:
        """Wait for a chunk and return it encoded; None if it will not arrive or does not arrive in time."""
        with self._changed:
            self._changed.wait_for(lambda: chunk in self._arrived or self._ended, timeout_s)
            if chunk not in self._arrived:
                return None
        return self.read(chunk)

    def release(self) -> None:
        """End the use of the spool. The chunks stay for a later receiver."""
        self.end()
        self._lease.release()

    def close(self) -> None:
        """End the use of the spool and remove the chunks."""
        self.release()
        remove_tree(self.directory)


def _remove_abandoned(current: Path) -> None:
    digest = current.name.partition(".")[0]
    for path in current.parent.iterdir():
        with contextlib.suppress(OSError), unused(path) as free:
            is_old = time.time() - path.stat().st_mtime > _ABANDONED_S
            if free and path != current and (is_old or path.name.startswith(digest)):
                shutil.rmtree(path)


def receive_venv(
    venv_plan: VenvPlan,
    root: Path,
    clock: PhaseClock,
    log: BuildLog,
    *,
    listing: Listing,
    spool: Spool,
    fetch: Fetch,
    store: Store,
    source: str,
) -> None:
    """Fill the directory `root` with the venv of `listing`. Links files that this disk already has instead of fetching.

    Args:
        venv_plan: plan of the venv.
        root: the new directory.
        listing: the sender's listing.
        spool: keeps the chunks.
        fetch: gets chunks from other nodes.
        source: name of the sending node, for the progress display.

    Raises:
        BroadcastError: the received files differ from the sent ones, or cannot be unpacked.
        NoSpaceError: a disk is full.
        VenvError: this node lacks the source of an editable package.
    """
    clock.start("fetch", f"from {source}")
    _check_local_packages(venv_plan)
    python = ["--python", venv_plan.python.executable, "--no-python-downloads"]
    run_uv(["venv", "--no-project", "--quiet", *python, str(root)], what="Receiving a venv", cwd=root.parent, log=log)
    try:
        with contextlib.ExitStack() as stack:
            unpacker = Unpacker(listing, root)
            stack.callback(unpacker.close)
            num_linked = unpacker.link_from(_sealed_venvs(store))
            needed = unpacker.needed
            missing = {chunk for chunk in needed if chunk not in spool}
            fetched = stack.enter_context(contextlib.closing(fetch(sorted(missing))))
            clock.report(f"{len(needed)} of {listing.num_chunks} chunks; {num_linked / 2**20:.0f} MiB are on this disk")
            for chunk in needed:
                unpacker.feed(chunk, next(fetched) if chunk in missing else decode_chunk(spool.read(chunk)))
            clock.start("link")
            unpacker.finish()
    except OSError as error:
        if is_no_space(error):
            raise no_space_error(f"Receiving the venv {listing.digest[:DIGEST_PREFIX]}") from error
        raise BroadcastError(f"a venv could not be unpacked on {socket.gethostname()}: {error}") from error
    finally:
        spool.end()


def _check_local_packages(venv_plan: VenvPlan) -> None:
    for package in venv_plan.packages:
        if package.local is not None and package.local.editable and not located(package.local.path).is_dir():
            raise VenvError(
                f"{package.name} is an editable package: the venv only links to {package.local.path}, which does not "
                f"exist on {socket.gethostname()}. Copy the source to the same path on every node, or track it with "
                "git so that it is sent."
            )


def _sealed_venvs(store: Store) -> Iterator[Path]:
    for digest in store.digests():
        root = Path(os.path.realpath(store.link(digest)))
        with contextlib.suppress(BrokenManifestError):
            read_manifest(root)
            yield root
