"""A venv that arrives from another node: what has come is kept on disk, unpacked, and served to nodes further down.

::

    other node ── fetch ─► Spool (one file per chunk, checked) ─► Unpacker ─► new venv directory ─► check, seal
                                   └── wait ─► nodes further down

The spool outlives a receiver that is killed: what had arrived is not sent again. It is removed when all nodes are done.
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

# Yields the wanted chunks in the same order, checked and raw, after it has put each into the spool.
Fetch = Callable[[Sequence[int]], Generator[bytes]]


class Spool:
    """The chunks of one stream that have arrived on this node, for its own venv and for other nodes.

    Opening it finds what an earlier receiver left, drops what of that is broken, and removes spools that nobody uses:
    of another stream for the same venv, and old ones.
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
        self._arrived = {chunk for chunk in range(listing.num_chunks) if self._is_whole(chunk)}

    def _path(self, chunk: int) -> Path:
        return self.directory / f"{chunk:06d}"

    def _is_whole(self, chunk: int) -> bool:
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
        """Keep a chunk that was checked."""
        temporary = self._path(chunk).with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(data)
        os.replace(temporary, self._path(chunk))
        with self._changed:
            self._arrived.add(chunk)
            self._changed.notify_all()

    def read(self, chunk: int) -> bytes:
        """A chunk that has arrived."""
        return self._path(chunk).read_bytes()

    def end(self) -> None:
        """No more chunks will come: those that wait for one need wait no longer."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self, chunk: int, timeout_s: float) -> bytes | None:
        """A chunk as soon as it is here; None when it will not come, or has not come in time."""
        with self._changed:
            self._changed.wait_for(lambda: chunk in self._arrived or self._ended, timeout_s)
            if chunk not in self._arrived:
                return None
        return self.read(chunk)

    def release(self) -> None:
        """Let go of the chunks; they stay for a later receiver."""
        self.end()
        self._lease.release()

    def close(self) -> None:
        """Let go of the chunks and remove them: every node has what it needs."""
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
    """Fill `root` with the venv of `listing`; what this disk has already is linked and not fetched.

    Raises `BroadcastError` if what arrives differs from what was sent, and `VenvError` if this node cannot unpack it.
    """
    clock.start("fetch", f"from {source}")
    _check_local_packages(venv_plan)
    python = ["--python", venv_plan.python.executable, "--no-python-downloads"]
    run_uv(["venv", "--no-project", "--quiet", *python, str(root)], what="Receiving a venv", cwd=root.parent, log=log)
    try:
        with contextlib.ExitStack() as stack:
            unpacker = Unpacker(listing, root)
            stack.callback(unpacker.close)
            adopted = unpacker.adopt(_sealed_venvs(store))
            needed = unpacker.needed
            missing = {chunk for chunk in needed if chunk not in spool}
            fetched = stack.enter_context(contextlib.closing(fetch(sorted(missing))))
            clock.report(f"{len(needed)} of {listing.num_chunks} chunks, {adopted / 2**20:.0f} MiB are here already")
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
                f"{package.name} is an editable package: the venv only links to {package.local.path}, which is not "
                f"there on {socket.gethostname()}. Bring the source to the same path on every node, or let git "
                "track it: then it is sent."
            )


def _sealed_venvs(store: Store) -> Iterator[Path]:
    for digest in store.digests():
        root = Path(os.path.realpath(store.link(digest)))
        with contextlib.suppress(BrokenManifestError):
            read_manifest(root)
            yield root
