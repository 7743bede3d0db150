"""What making a job's venvs ready would take on a node: which are there, bytes, seconds. Builds and downloads nothing.

Nobody knows the size of a package that was never seen, so every number says where it comes from: sizes from `uv.lock`
(which has them where the registry tells), uv's cache, the driver's venv and the sealed venvs of this node; seconds from
earlier builds on this node, else from rates measured elsewhere.
"""

from __future__ import annotations

import csv
import functools
import glob
import os
import statistics
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from nemo_rl import settings
from nemo_rl.distributed.provisioning.node_task import node_variables
from nemo_rl.secrets import mask_secrets
from nemo_rl.venvs import Manifest, Package, Store, VenvInfo, VenvPlan, VenvSpec, find_sealed, list_venvs
from nemo_rl.venvs.planning.resolve import lock_root

READY, BUILT, REFUSED, IGNORED = "ready", "would be built", "would be refused", "an older one would be used"
RECEIVED = "would come from another node"

# Measured on two cores with a fast registry, for packages with torch and CUDA. Bytes are installed bytes.
_FETCH_BYTES_PER_S = 180e6  # 8.0 GB downloaded, unpacked and linked in 45 s
_LINK_BYTES_PER_S = 1.3e9  # 6.7 GB in 4.3 s to 5 s: hard links, bytecode that another venv has, checks
_COMPILE_BYTES_PER_S = 370e6  # 6.7 GB in 18 s, none of it compiled before
_WHEEL_PER_INSTALLED = 0.57  # what deflate makes of the base venv


@dataclass(frozen=True)
class VenvForecast:
    """One venv on one node.

    Attributes:
        venv: the py_executable, of an additive venv also that of its base.
        digest: its identity on this node's platform.
        state: `READY`, `BUILT`, `RECEIVED`, or by the drift policy `REFUSED` or `IGNORED`.
        num_packages: it holds; num_cached: of those in uv's cache on this node.
        num_unknown: packages of unknown size: the bytes and seconds are without them.
        download_bytes: still to be fetched; installed_bytes: as `du` would count them without hard links.
        seconds: until it is sealed, alone on the node; basis: where that number comes from.
    """

    venv: str
    digest: str
    state: str
    num_packages: int
    num_cached: int = 0
    num_unknown: int = 0
    download_bytes: int = 0
    installed_bytes: int = 0
    seconds: float = 0.0
    basis: str = ""


def forecast_venvs(
    plans: Mapping[str, VenvPlan], wheel_sizes: Mapping[str, int], variables: Mapping[str, str]
) -> list[VenvForecast]:
    """The forecast of each venv for the node that this runs on, a base before what is laid over it.

    Args:
        plans: name under the venv directory (a worker's FQN) -> what it holds.
        wheel_sizes: `name==version` -> bytes, as `wheel_sizes_of` reads them where the lock is.
        variables: the driver's, which decide where a node keeps venvs.
    """
    with settings.exported(node_variables(variables)):
        store = Store.default()
        infos = list_venvs(store)
        sizes = _Sizes(infos, wheel_sizes)
        return [_forecast(name, layer, store, infos, sizes) for name, layer in _layers(plans)]


def wheel_sizes_of(plans: Iterable[VenvPlan]) -> dict[str, int]:
    """Bytes of the wheels for this platform, by `name==version`, as far as the locks of these plans say."""
    specs = [layer.spec for _, layer in _layers({str(i): plan for i, plan in enumerate(plans)})]
    roots = {lock_root(spec.project) for spec in specs if isinstance(spec, VenvSpec)}
    sizes: dict[str, int] = {}
    for root in roots:
        for entry in tomllib.loads((root / "uv.lock").read_text(encoding="utf-8")).get("package", []):
            size = _wheel_size(entry.get("wheels", ()))
            if size is not None:
                sizes[f"{canonicalize_name(entry['name'])}=={entry['version']}"] = size
    return sizes


def _layers(plans: Mapping[str, VenvPlan]) -> Iterator[tuple[str, VenvPlan]]:
    """Each venv that there is to build once, bases first."""
    seen = set()
    for name, plan in plans.items():
        for layer in (plan.base, plan):
            if layer is not None and not layer.is_interpreter and layer.digest not in seen:
                seen.add(layer.digest)
                yield name, layer


def _forecast(name: str, plan: VenvPlan, store: Store, infos: list[VenvInfo], sizes: _Sizes) -> VenvForecast:
    what, num = mask_secrets(str(plan.spec)), len(plan.packages)
    if find_sealed(plan.digest, store) is not None and not settings.FORCE_REBUILD_VENVS.get():
        return VenvForecast(what, plan.digest, READY, num)
    policy = settings.venv_drift()
    if policy != "rebuild" and not settings.FORCE_REBUILD_VENVS.get() and _has_earlier(name, what, infos):
        return VenvForecast(what, plan.digest, REFUSED if policy == "refuse" else IGNORED, num)
    num_cached = num_unknown = download = fetched = installed = compiled = 0
    for package in plan.packages:
        if package.local is not None and package.local.editable:
            continue  # linked from its directory
        on_disk, wheel, cached, has_bytecode = sizes.of(package)
        num_cached += cached
        if on_disk is None and wheel is None:
            num_unknown += 1
            continue
        on_disk = on_disk if on_disk is not None else int((wheel or 0) / _WHEEL_PER_INSTALLED)
        installed += on_disk
        compiled += 0 if has_bytecode else on_disk
        if not cached:
            fetched += on_disk
            download += wheel if wheel is not None else int(on_disk * _WHEEL_PER_INSTALLED)
    seconds, basis = _build_seconds(plan, what, installed, compiled, infos)
    if fetched:
        seconds += fetched / _FETCH_BYTES_PER_S
        basis += f"; fetching at {_FETCH_BYTES_PER_S / 1e6:.0f} MB/s installed, measured elsewhere"
    return VenvForecast(
        what, plan.digest, BUILT, num, num_cached, num_unknown, download, installed, round(seconds, 1), basis
    )


def _has_earlier(name: str, what: str, infos: list[VenvInfo]) -> bool:
    """Whether a venv exists to which the drift policy applies: see `nemo_rl.venvs.ensure`."""
    return any(i.manifest is not None and (name in i.names or i.manifest.spec == what) for i in infos)


def _build_seconds(
    plan: VenvPlan, what: str, installed: int, compiled: int, infos: list[VenvInfo]
) -> tuple[float, str]:
    """Seconds of all phases but the fetching, and where the number comes from."""
    manifests = [info.manifest for info in infos if info.manifest is not None]
    same = [manifest for manifest in manifests if manifest.spec == what]
    if same:
        latest = max(same, key=lambda manifest: manifest.started_at)
        return _seconds_of(latest), f"the build of {latest.built_at[:16]} on this node"
    kind = [m for m in manifests if (m.base_digest is None and not m.base_paths) == (plan.base is None)]
    rates = [_seconds_of(manifest) / manifest.num_bytes for manifest in kind if manifest.num_bytes]
    if rates:
        return installed * statistics.median(rates), f"median of {len(rates)} builds on this node, per byte"
    compiling = compiled / _COMPILE_BYTES_PER_S if settings.COMPILE_BYTECODE.get() else 0.0
    return installed / _LINK_BYTES_PER_S + compiling, "rates measured on two cores elsewhere"


def _seconds_of(manifest: Manifest) -> float:
    return sum(seconds for phase, seconds in manifest.seconds.items() if phase not in ("fetch", "wait"))


class _Sizes:
    """What this node knows of the sizes of packages."""

    def __init__(self, infos: list[VenvInfo], wheel_sizes: Mapping[str, int]) -> None:
        self._wheel_sizes = wheel_sizes
        self._cache = settings.uv_cache_dir()
        roots = [Path(sys.prefix), *(info.path for info in infos if info.path is not None)]
        self._places = [place for root in roots for place in root.glob("lib/python*/site-packages")]

    def of(self, package: Package) -> tuple[int | None, int | None, bool, bool]:
        """(installed bytes, bytes of the wheel, whether uv's cache has it, whether another venv has its bytecode)."""
        key = (canonicalize_name(package.name), package.version or "")
        cached = self._cached(*key)
        donors = [records[key] for records in map(_records, self._places) if key in records]
        sizes = (_recorded_bytes(record) for record in [*cached, *donors])
        installed = next((size for size in sizes if size), None)
        return installed, self._wheel_sizes.get("==".join(key)), bool(cached), bool(donors)

    def _cached(self, name: str, version: str) -> list[Path]:
        """Where uv's cache has it unpacked. The layout is uv's own: one that is not known finds nothing."""
        found: list[Path] = []
        for index in ("pypi", "index/*", "url/*"):
            pattern = os.path.join(glob.escape(str(self._cache)), "wheels-v*", index, name, f"{version}-*", "")
            found += [record for path in glob.glob(pattern) for record in Path(path).glob("*.dist-info/RECORD")]
        return found


@functools.lru_cache(maxsize=64)
def _records(site_packages: Path) -> dict[tuple[str, str], Path]:
    """(name, version) -> RECORD of what is installed there."""
    found: dict[tuple[str, str], Path] = {}
    for path in site_packages.glob("*.dist-info"):
        name, _, version = path.name.removesuffix(".dist-info").partition("-")
        found[canonicalize_name(name), version] = path / "RECORD"
    return found


def _recorded_bytes(record: Path) -> int:
    try:
        with record.open(encoding="utf-8", newline="") as file:
            return sum(int(row[2]) for row in csv.reader(file) if len(row) > 2 and row[2].isdigit())
    except (OSError, ValueError, csv.Error):
        return 0


def _wheel_size(wheels: Iterable[Mapping[str, object]]) -> int | None:
    """Bytes of the wheel that fits this interpreter best, when the lock knows them."""
    best, size = len(_tags()), None
    for wheel in wheels:
        name = str(wheel.get("url") or wheel.get("path") or wheel.get("filename") or "").rpartition("/")[2]
        try:
            rank = min((_tags().get(tag, best) for tag in parse_wheel_filename(name)[3]), default=best)
        except InvalidWheelFilename:
            continue
        if rank < best and isinstance(wheel.get("size"), int):
            best, size = rank, int(str(wheel["size"]))
    return size


@functools.cache
def _tags() -> dict[object, int]:
    return {tag: rank for rank, tag in enumerate(sys_tags())}
