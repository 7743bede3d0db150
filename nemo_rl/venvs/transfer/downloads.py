"""Downloads wheels and source archives as their index serves them. uv keeps only what it unpacks from them."""

from __future__ import annotations

import base64
import netrc
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO

from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from nemo_rl import settings
from nemo_rl.errors import BundleError
from nemo_rl.secrets import mask_secrets
from nemo_rl.venvs.planning.plan import Package
from nemo_rl.venvs.storage.verify import file_hash

_ATTEMPTS = 3
_TIMEOUT_S = 30.0
_SOURCE_SUFFIXES = (".tar.gz", ".zip", ".tar.bz2", ".tar.xz", ".tgz")
_INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")


def choose_source(package: Package) -> str:
    """Return the URL or path of the file of a package that fits this process's Python best, as uv chooses it.

    Raises:
        BundleError: there is none.
    """
    ranks = {tag: rank for rank, tag in enumerate(sys_tags())}
    wheels = []
    for source in package.sources:
        try:
            _, _, build, tags = parse_wheel_filename(file_name(source))
        except InvalidWheelFilename:
            continue
        rank = min((ranks[tag] for tag in tags if tag in ranks), default=None)
        if rank is not None:
            wheels.append((rank, [-number for number in build[:1] if isinstance(number, int)], source))
    if wheels:
        return min(wheels)[2]
    for source in package.sources:
        if file_name(source).endswith(_SOURCE_SUFFIXES):
            return source
    raise BundleError(
        f"{package} cannot be bundled: it has no wheel for this Python and platform, and no source archive."
    )


def file_name(source: str) -> str:
    """Return the name of the file at a URL or path.

    Example:
        >>> file_name("https://host/a/torch-2.0%2Bcpu-py3-none-any.whl#sha256=0")
        'torch-2.0+cpu-py3-none-any.whl'
    """
    path = urllib.parse.unquote(urllib.parse.urlsplit(source).path) if "://" in source else source
    return path.rpartition("/")[2]


def download(source: str, directory: Path) -> Path:
    """Store the file at a URL or path in `directory/<sha256>` and return it.

    Proxies and certificates are those of the environment; credentials come from the URLs of indexes and from netrc.

    Raises:
        BundleError: the file cannot be read.
    """
    target = Path(tempfile.mkdtemp(dir=directory)) / file_name(source)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with _opened(source) as answer, target.open("wb") as file:
                shutil.copyfileobj(answer, file, 2**20)
            break
        except OSError as error:  # urllib's errors are OSErrors too
            is_final = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
            if is_final or attempt == _ATTEMPTS or "://" not in source:
                raise BundleError(
                    f"{mask_secrets(source)} cannot be downloaded: {error}. If the index needs a password, put it into "
                    "netrc or into the URL in UV_DEFAULT_INDEX or UV_INDEX."
                ) from None
            time.sleep(attempt)
    place = directory / file_hash(str(target))
    place.mkdir(exist_ok=True)
    path = target.replace(place / target.name)
    target.parent.rmdir()
    return path


def _opened(source: str) -> IO[bytes]:
    if "://" not in source:
        return open(source, "rb")
    parts = urllib.parse.urlsplit(source)
    request = urllib.request.Request(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl())
    credentials = _credentials(parts)
    if credentials is not None:
        value = base64.b64encode(":".join(credentials).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {value}")
    return urllib.request.urlopen(request, timeout=_TIMEOUT_S)


def _credentials(parts: urllib.parse.SplitResult) -> tuple[str, str] | None:
    """Return user and password for a URL: its own, those of an index on the same host, or those in netrc."""
    variables = settings.snapshot()
    indexes = [urllib.parse.urlsplit(url) for url in _index_urls(variables)]
    for candidate in (parts, *indexes):
        if candidate.hostname == parts.hostname and candidate.username is not None:
            return urllib.parse.unquote(candidate.username), urllib.parse.unquote(candidate.password or "")
    try:
        found = netrc.netrc(variables.get("NETRC")).authenticators(parts.hostname or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return (found[0], found[2]) if found is not None else None


def _index_urls(variables: dict[str, str]) -> list[str]:
    words = [word for name in _INDEX_VARIABLES for word in variables.get(name, "").split()]
    return [re.sub(r"^[\w.-]+=", "", word) for word in words]  # an index may be given as NAME=URL
