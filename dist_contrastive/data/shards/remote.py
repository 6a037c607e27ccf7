"""Remote files through fsspec, with retries."""

import asyncio
import functools
import logging
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

import fsspec
import psutil

from dist_contrastive.errors import DataError, UnreachableError, UnreadableSample, redacted

_T = TypeVar("_T")
_logger = logging.getLogger(__name__)

# Client errors that are transient: an answer that cannot be parsed (as which aiohttp counts a torn
# one), timeout, too early, too many requests.
_TRANSIENT = (400, 408, 425, 429)
_MAX_REASON = 300  # characters
_CHUNK = 1 << 16  # bytes
_SLOWEST = 1 << 14  # bytes a second
_MOST_UNTOLD = 1 << 26  # bytes of a content whose length no server has told
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_LOGGED = (4, 7)  # attempts whose failure is logged, lest waiting looks like hanging


def is_url(location: str) -> bool:
    """Whether fsspec opens it, rather than `open`."""
    return "://" in location


class Retries(NamedTuple):
    """Exponential backoff with jitter, so that ranks do not return all at once."""

    attempts: int = 10
    first_wait_s: float = 0.25
    longest_wait_s: float = 30.0
    timeout_s: float = 60.0
    """Seconds without a byte after which a request counts as failed."""


retries = Retries()


def read_range(
    url: str, start: int, stop: int, known_size: int, attempts: int | None = None
) -> bytes:
    """Bytes [start, stop) of a remote file of a known size.

    Raises:
        UnreadableSample: there is no such file, the server refuses it, or it has another size.
        UnreachableError: no attempt brought all the bytes.
        DataError: fsspec does not know the protocol, or lacks a package for it; or the server
            knows only whole files.
    """

    def request() -> bytes:
        data = _file_system(url).cat_file(url, start=start, end=stop)
        if len(data) > stop - start:
            raise DataError(
                f"the server of {url} sent {len(data)} bytes where {stop - start} were asked for: "
                f"use one that answers range requests, or copy the shards to a disk"
            )
        if len(data) != stop - start:
            _check_size(url, known_size)
            raise OSError(f"{stop - start} bytes from {start} on were asked for, {len(data)} came")
        return data

    return _retry(request, url, attempts)


def _check_size(url: str, known: int) -> None:
    size = _file_system(url).info(url)["size"]
    if size not in (None, known):
        raise UnreadableSample(
            f"shard {url} is damaged or was changed: it has {size} bytes but {known} were "
            f"indexed; restore it, or index it again if it was changed on purpose"
        )


def read_all(url: str) -> bytes:
    """Content of a small remote file. Raises: as `read_range`."""
    return _retry(lambda: _file_system(url).cat_file(url), url)


def size(url: str) -> int | None:
    """Size in bytes, None if the server does not send it. Raises: as `read_range`."""
    return _retry(lambda: _file_system(url).info(url)["size"], url)


def glob(pattern: str) -> list[str]:
    """URLs that match, sorted, as far as the server lists files. Raises: as `read_range`."""
    system = _file_system(pattern)
    return _retry(lambda: sorted(map(system.unstrip_protocol, system.glob(pattern))), pattern)


# By hand: tenacity would save 6 of these 30 lines, and be one more dependency.
def _retry(request: Callable[[], _T], url: str, attempts: int | None = None) -> _T:
    begin, wait_s = time.monotonic(), retries.first_wait_s
    attempts = attempts or retries.attempts
    for attempt in range(1, attempts + 1):
        try:
            return request()
        except DataError:
            raise
        except Exception as error:  # every protocol has its own
            reason = redacted(f"{type(error).__name__}: {error}".replace("\n", " "))[:_MAX_REASON]
            if _is_offline(error):
                raise DataError(
                    f"{url} cannot be read while this machine's hub is off (HF_HUB_OFFLINE or its "
                    f"like is set): unset that, or copy the shards to a disk and name them there"
                ) from error
            if _is_final(error):
                raise UnreadableSample(
                    f"{url} is not there or may not be read ({reason}); restore it, or leave it "
                    f"out of the index"
                ) from error
            if attempt == attempts:
                raise UnreachableError(
                    f"{url} could not be read in {attempt} attempts over "
                    f"{time.monotonic() - begin:.0f} s ({reason}); see to the server or the "
                    f"network, then start again"
                ) from error
            if attempt in _LOGGED:
                _logger.warning(
                    "waiting for %s (attempt %d of %d failed: %s)",
                    *(redacted(url), attempt, attempts, reason),
                )
        time.sleep(wait_s * random.uniform(0.5, 1))
        wait_s = min(2 * wait_s, retries.longest_wait_s)
    raise AssertionError("every attempt returns or raises")


def _is_offline(error: BaseException | None) -> bool:
    """Whether the hub was not even asked, since the user forbids it."""
    while error is not None and type(error).__name__ != "OfflineModeIsEnabled":
        error = error.__cause__ or error.__context__
    return error is not None


def _is_final(error: Exception) -> bool:
    """Whether another attempt would fail too."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _TRANSIENT
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return _is_final(error.__cause__)  # fsspec says this of a server that is busy, too
    return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)


_systems: dict[tuple[int, str, str, Retries], Any] = {}


def _file_system(url: str) -> Any:
    """File system of a URL; a forked process opens its own."""
    protocol, _, rest = url.partition("://")
    key = (os.getpid(), protocol, rest.partition("/")[0], retries)
    if key not in _systems:
        try:
            _systems[key] = fsspec.core.url_to_fs(url, **_options(protocol))[0]
        except Exception as error:  # every protocol has its own
            raise DataError(
                f"{url} cannot be opened ({error}); use file, http, https or another protocol of "
                f"fsspec whose package is installed (s3: pip install 'dist-contrastive[s3]')"
            ) from error
    return _systems[key]


def _options(protocol: str) -> dict[str, Any]:
    if protocol not in ("http", "https"):
        return {}
    import aiohttp  # with http only

    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=retries.timeout_s, sock_read=retries.timeout_s
    )
    # Shards must arrive as they lie: a server that compresses on the way changes the length.
    headers = {"Accept-Encoding": "identity"}
    response = _bounded_response()
    return {"client_kwargs": {"timeout": timeout, "headers": headers, "response_class": response}}


@functools.cache
def _bounded_response() -> Any:
    import aiohttp

    class Bounded(aiohttp.ClientResponse):
        """Response whose headers and content come in time, and fit into memory: a server may send
        a byte a second, or for ever."""

        async def start(self, connection: Any) -> Any:
            async with asyncio.timeout(retries.timeout_s):
                return await super().start(connection)

        async def read(self) -> bytes:
            if self._body is None:
                content, most, begin = bytearray(), self._most_bytes(), time.monotonic()
                async for chunk in self.content.iter_chunked(_CHUNK):
                    content += chunk
                    spent_s = time.monotonic() - begin
                    if len(content) > most:
                        self._refuse(most)
                    if spent_s > retries.timeout_s and len(content) < _SLOWEST * spent_s:
                        self.close()
                        raise TimeoutError(f"{len(content)} bytes came in {spent_s:.0f} s")
                self._body = bytes(content)
            return self._body

        def _most_bytes(self) -> int:
            asked = _RANGE.fullmatch(self.request_info.headers.get("Range", ""))
            if asked:
                return int(asked[2]) - int(asked[1]) + 1
            length, free = self.content_length, psutil.virtual_memory().available
            if length is None or "Content-Encoding" in self.headers:
                return min(_MOST_UNTOLD, free)
            if length > free // 2:
                self._refuse(free // 2)
            return length

        def _refuse(self, most: int) -> NoReturn:
            self.close()
            sent = self.content_length or "more"
            raise DataError(
                f"the server of {self.url} sent {sent} bytes where {most} were asked for or fit: "
                f"use one that answers range requests and tells sizes, or copy the shards to a disk"
            )

    return Bounded
