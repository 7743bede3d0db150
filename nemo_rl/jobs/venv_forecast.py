"""Forecasts the venv builds of a job on a node: state, bytes and seconds, without building or downloading.

Every number states its source. Sizes come from `uv.lock` (if the index reports them), uv's cache, the driver's venv and
the sealed venvs of this node. Seconds come from earlier builds on this node, else from rates measured elsewhere.
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
from nemo_rl.venvs import Manifest, Package, Store, VenvInfo, VenvPlan, find_sealed, list_venvs

READY, BUILT, REFUSED, IGNORED = "ready", "would be built", "would be refused", "an older one would be used"
RECEIVED = "would come from another node"

# Measured on two cores with a fast package index, for venvs with torch and CUDA. Bytes are installed bytes.
_FETCH_BYTES_PER_S = 180e6  # 8.0 GB downloaded, unpacked and linked in 45 s
_LINK_BYTES_PER_S = 1.3e9  # 6.7 GB in 4.3 s to 5 s: hard links, bytecode of another venv, checks
_COMPILE_BYTES_PER_S = 370e6  # 6.7 GB in 18 s, without bytecode of another venv
_WHEEL_PER_INSTALLED = 0.57  # compression ratio of the base venv


@dataclass(frozen=True)
class VenvForecast:
    """Forecasts one venv on one node.

    Attributes:
        venv: the py_executable, for an overlay including its base venv.
        digest: digest of the venv on this node's platform.
        state: `READY`, `BUILT`, `RECEIVED`, or, depending on the drift policy, `REFUSED` or `IGNORED`.
        num_packages: number of packages.
        num_cached: number of packages in uv's cache on this node.
        num_unknown: number of packages of unknown size, which bytes and seconds do not include.
        download_bytes: bytes to download.
        installed_bytes: bytes on disk without hard links.
        seconds: duration of the build, if no other build runs.
        basis: source of `seconds`.
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
    """Forecast each venv on the node that calls this, base venvs before their overlays.

    Args:
        plans: name in the venv directory (a worker's FQN) -> plan of the venv.
        wheel_sizes: `name==version` -> bytes, from `wheel_sizes_of` on the driver, which has the lock.
        variables: environment variables of the driver that decide where a node stores venvs.
    """
    with settings.exported(node_variables(variables)):
        store = Store.default()
        infos = list_venvs(store)
        sizes = _Sizes(infos, wheel_sizes)
        return [_forecast(name, layer, store, infos, sizes) for name, layer in _layers(plans)]


def wheel_sizes_of(plans: Iterable[VenvPlan]) -> dict[str, int]:
    """Return the bytes of the wheels for this platform by `name==version`, if the lock files have them."""
    layers = [layer for _, layer in _layers({str(i): plan for i, plan in enumerate(plans)})]
    roots = {Path(layer.lock_root) for layer in layers if layer.lock_root is not None}
    sizes: dict[str, int] = {}
    for root in roots:
        for entry in tomllib.loads((root / "uv.lock").read_text(encoding="utf-8")).get("package", []):
            size = _wheel_size(entry.get("wheels", ()))
            if size is not None:
                sizes[f"{canonicalize_name(entry['name'])}=={entry['version']}"] = size
    return sizes


def _layers(plans: Mapping[str, VenvPlan]) -> Iterator[tuple[str, VenvPlan]]:
    """Yield each distinct venv once, base venvs first."""
    seen = set()
    for name, plan in plans.items():
        for layer in (plan.base, plan):
            if layer is not None and not layer.is_interpreter and layer.digest not in seen:
                seen.add(layer.digest)
                yield name, layer


def _forecast(name: str, plan: VenvPlan, store: Store, infos: list[VenvInfo], sizes: _Sizes) -> VenvForecast:
    spec, num = mask_secrets(str(plan.spec)), len(plan.packages)
    if find_sealed(plan.digest, store) is not None and not settings.FORCE_REBUILD_VENVS.get():
        return VenvForecast(spec, plan.digest, READY, num)
    policy = settings.venv_drift()
    if policy != "rebuild" and not settings.FORCE_REBUILD_VENVS.get() and _has_earlier(name, spec, infos):
        return VenvForecast(spec, plan.digest, REFUSED if policy == "refuse" else IGNORED, num)
    num_cached = num_unknown = download = fetched = installed = compiled = 0
    for package in plan.packages:
        if package.local is not None and package.local.editable:
            continue  # linked from its directory
        size = sizes.of(package)
        num_cached += size.is_cached
        if size.installed is None:
            num_unknown += 1
            continue
        installed += size.installed
        compiled += 0 if size.has_bytecode else size.installed
        if not size.is_cached:
            fetched += size.installed
            download += size.wheel or 0
    seconds, basis = _build_seconds(plan, spec, installed, compiled, infos)
    if fetched:
        seconds += fetched / _FETCH_BYTES_PER_S
        basis += f"; fetching at {_FETCH_BYTES_PER_S / 1e6:.0f} MB/s installed, measured elsewhere"
    return VenvForecast(
        spec, plan.digest, BUILT, num, num_cached, num_unknown, download, installed, round(seconds, 1), basis
    )


def _has_earlier(name: str, spec: str, infos: list[VenvInfo]) -> bool:
    """Return whether the drift policy applies: an older venv with this name or py_executable exists."""
    return any(i.manifest is not None and (name in i.names or i.manifest.spec == spec) for i in infos)


def _build_seconds(
    plan: VenvPlan, spec: str, installed: int, compiled: int, infos: list[VenvInfo]
) -> tuple[float, str]:
    """Estimate the seconds of all phases except fetching; return them with their source."""
    manifests = [info.manifest for info in infos if info.manifest is not None]
    same = [manifest for manifest in manifests if manifest.spec == spec]
    if same:
        latest = max(same, key=lambda manifest: manifest.started_at)
        return _seconds_of(latest), f"the build of {latest.built_at[:16]} on this node"
    same_kind = [m for m in manifests if (m.base_digest is None and not m.base_paths) == (plan.base is None)]
    rates = [_seconds_of(manifest) / manifest.num_bytes for manifest in same_kind if manifest.num_bytes]
    if rates:
        return installed * statistics.median(rates), f"median of {len(rates)} builds on this node, per byte"
    compiling = compiled / _COMPILE_BYTES_PER_S if settings.COMPILE_BYTECODE.get() else 0.0
    return installed / _LINK_BYTES_PER_S + compiling, "rates measured on two cores elsewhere"


def _seconds_of(manifest: Manifest) -> float:
    return sum(seconds for phase, seconds in manifest.seconds.items() if phase not in ("fetch", "wait"))


@dataclass(frozen=True)
class _PackageSize:
    """Size of one package on this node: bytes of its files and of its wheel, None if unknown."""

    installed: int | None
    wheel: int | None
    is_cached: bool  # in uv's cache
    has_bytecode: bool  # in another venv


class _Sizes:
    """Looks up package sizes in uv's cache, the driver's venv, the sealed venvs and the lock."""

    def __init__(self, infos: list[VenvInfo], wheel_sizes: Mapping[str, int]) -> None:
        self._wheel_sizes = wheel_sizes
        self._cache = settings.uv_cache_dir()
        roots = [Path(sys.prefix), *(info.path for info in infos if info.path is not None)]
        self._site_packages = [path for root in roots for path in root.glob("lib/python*/site-packages")]

    def of(self, package: Package) -> _PackageSize:
        """Return the size of a package. If only one of wheel and installed size is known, the other is estimated."""
        key = (canonicalize_name(package.name), package.version or "")
        cached = self._cached(*key)
        donors = [records[key] for records in map(_records, self._site_packages) if key in records]
        sizes = (_recorded_bytes(record) for record in [*cached, *donors])
        installed = next((size for size in sizes if size), None)
        wheel = self._wheel_sizes.get("==".join(key))
        if installed is None and wheel is not None:
            installed = int(wheel / _WHEEL_PER_INSTALLED)
        elif wheel is None and installed is not None:
            wheel = int(installed * _WHEEL_PER_INSTALLED)
        return _PackageSize(installed, wheel, bool(cached), bool(donors))

    def _cached(self, name: str, version: str) -> list[Path]:
        """Find the RECORD files of a package in uv's cache; with an unknown cache layout there are none."""
        records: list[Path] = []
        for index in ("pypi", "index/*", "url/*"):
            pattern = os.path.join(glob.escape(str(self._cache)), "wheels-v*", index, name, f"{version}-*", "")
            records += [record for path in glob.glob(pattern) for record in Path(path).glob("*.dist-info/RECORD")]
        return records


@functools.lru_cache(maxsize=64)
def _records(site_packages: Path) -> dict[tuple[str, str], Path]:
    """Map (name, version) to the RECORD file of each installed package."""
    records: dict[tuple[str, str], Path] = {}
    for path in site_packages.glob("*.dist-info"):
        name, _, version = path.name.removesuffix(".dist-info").partition("-")
        records[canonicalize_name(name), version] = path / "RECORD"
    return records


def _recorded_bytes(record: Path) -> int:
    try:
        with record.open(encoding="utf-8", newline="") as file:
            return sum(int(row[2]) for row in csv.reader(file) if len(row) > 2 and row[2].isdigit())
    except (OSError, ValueError, csv.Error):
        return 0


def _wheel_size(wheels: Iterable[Mapping[str, object]]) -> int | None:
    """Return the bytes of the best wheel for this interpreter, if the lock has them."""
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
