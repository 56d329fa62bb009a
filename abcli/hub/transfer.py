"""Receives one file from the hub, as often interrupted as it may be, and says what is wrong with the hub or network."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from abcli.errors import DownloadError, UsageError
from abcli.hub.proxy import proxy_for, unusable_settings

# Seconds before another try after one that brought nothing; one that brought something is followed at once.
WAITS = (1.0, 2.0, 4.0)
# Timeout, too many requests, and the server's own troubles: they may pass.
_PASSING = (408, 429, 500, 502, 503, 504)
_RANGE = re.compile(r"bytes (\d+)-")
_LOGIN = "set HF_TOKEN to a token from https://huggingface.co/settings/tokens, or run `hf auth login`"
_CACHE_WORKS = "models that are in the cache work without it"


class NoAnswerError(DownloadError):
    """The hub could not be asked, or did not answer: what is in the cache has to do."""


def receive(url: str, stream: BinaryIO, size: int, progress: Callable[[int], None]) -> None:
    """Append to `stream` what it lacks of the file of `size` bytes at `url`; `progress` is told its size.

    `stream` is opened for appending. A connection that is cut, or a server in trouble, is tried again as long as that
    brings bytes, and then a few times more. Raises DownloadError for a server that sends too much or too little,
    and what the library raises.
    """
    trouble = http_errors()
    if stream.tell() > size:
        _restart(stream)
    fruitless = 0
    while (before := stream.tell()) < size:
        failure: Exception | None = None
        try:
            _receive_once(url, stream, size, progress)
        except trouble as error:
            if not _may_pass(error):
                raise
            failure = error
        if stream.tell() > before:
            fruitless = 0
        elif fruitless < len(WAITS):
            time.sleep(WAITS[fruitless])
            fruitless += 1
        elif failure is not None:
            raise failure
        else:
            raise DownloadError(f"the hub sent {before:,} of {size:,} bytes and no more", "try again later")


def _receive_once(url: str, stream: BinaryIO, size: int, progress: Callable[[int], None]) -> None:
    """One request for the rest; returns when the server has no more, and raises when the connection is cut."""
    from huggingface_hub import constants, get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    begin = stream.tell()
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if begin:
        headers["Range"] = f"bytes={begin}-"
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if response.status_code == 416:
            _restart(stream)
            return
        hf_raise_for_status(response)
        if begin and not _continues(response, begin):
            _restart(stream)
        for chunk in response.iter_bytes():
            stream.write(chunk)
            # What came must outlive this process, whatever ends it.
            stream.flush()
            progress(min(stream.tell(), size))
            if stream.tell() > size:
                _restart(stream)
                raise DownloadError(f"the hub sent more than the {size:,} bytes that it announced", "try again later")


def _continues(response: Any, begin: int) -> bool:
    """Whether an answer is the part from `begin` on, rather than the whole file."""
    match = _RANGE.match(response.headers.get("Content-Range", ""))
    return response.status_code == 206 and match is not None and int(match[1]) == begin


def _restart(stream: BinaryIO) -> None:
    stream.truncate(0)
    stream.seek(0)


def http_errors() -> tuple[type[Exception], ...]:
    """What the HTTP client inside huggingface_hub raises: httpx or httpx2, according to its version."""
    from huggingface_hub.errors import HfHubHTTPError

    kinds = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    with suppress(ImportError):
        # What a server that speaks no SOCKS sends is not translated by the client.
        from socksio import SOCKSError

        kinds.append(SOCKSError)
    return tuple(kinds)


def open_session() -> None:
    """Set up the HTTP client, which fails for some settings of proxies and certificates. Raises NoAnswerError."""
    from huggingface_hub import get_session

    try:
        get_session()
    except Exception as error:
        problem = unusable_settings(error)
        raise NoAnswerError(problem.message, f"{problem.hint}; {_CACHE_WORKS}") from error


def _may_pass(error: Exception) -> bool:
    status = status_of(error)
    return status is None or status in _PASSING


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error, None for one without an answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def reporting(repository: str) -> Iterator[None]:
    """Turn what huggingface_hub and its HTTP client raise into DownloadError, and what it says of names to UsageError.

    What prevents any answer is a NoAnswerError. Their own words are left out: a header that cannot be sent is quoted in
    them, and with it the token.
    """
    _check_endpoint()
    from huggingface_hub.errors import HFValidationError

    trouble: tuple[type[Exception], ...] = (OSError, UnicodeError, *http_errors())
    try:
        yield
    except HFValidationError:
        raise UsageError(f"{repository!r:.200} cannot be a repository", "write user/repository") from None
    except trouble as error:
        raise _translated(error, repository) from None


def _check_endpoint() -> None:
    """Raise NoAnswerError for an HF_ENDPOINT of which huggingface_hub would fail to be imported."""
    from huggingface_hub import constants

    try:
        parts = urlsplit(constants.ENDPOINT)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise NoAnswerError(
            f"HF_ENDPOINT is {constants.ENDPOINT!r:.200}, which is no address of http or https",
            f"write it like https://huggingface.co, or unset it; {_CACHE_WORKS}",
        )


def _translated(error: Exception, repository: str) -> DownloadError:
    """The error to show for one of the library's."""
    from huggingface_hub import errors

    # It hides what went wrong behind "not in the cache".
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    page = f"https://huggingface.co/{repository}"
    status = status_of(error)
    if isinstance(error, errors.GatedRepoError):
        reason = f"{repository} is gated: its owner asks you to accept terms first"
        hint = f"accept them at {page}; then {_LOGIN}"
        return DownloadError(reason, f"the account of your token has no access: {hint}" if _has_token() else hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return DownloadError(f"{repository} has no such revision", f"its branches, tags and commits are at {page}")
    if isinstance(error, errors.EntryNotFoundError) and status is not None:
        return DownloadError(f"{repository} no longer has that file", f"its files are at {page}/tree/main")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        return _refused(repository, status)
    if isinstance(error, errors.FileMetadataError) and status is None:
        return no_hub()
    if isinstance(error, UnicodeError) or "LocalProtocolError" in type(error).__name__:
        return NoAnswerError("your token for the hub holds characters that cannot be sent", _LOGIN)
    return _failed_on_the_way(error, repository, status)


def _failed_on_the_way(error: Exception, repository: str, status: int | None) -> DownloadError:
    """The error to show where the hub or a proxy before it failed or did not answer."""
    from huggingface_hub import constants

    proxy = proxy_for(constants.ENDPOINT)
    through = f" through the proxy {proxy.address}" if proxy is not None else ""
    if status == 407 and proxy is not None:
        return NoAnswerError(
            f"the proxy {proxy.address} wants a login", f"write it into {proxy.source}; {_CACHE_WORKS}"
        )
    if status == 429:
        return DownloadError("the hub has had too many requests from here (429)", f"wait a few minutes; {_LOGIN}")
    if status is not None:
        return DownloadError(f"the hub failed with status {status}{through}", "try again later; what is here is kept")
    check = f"the proxy, which comes from {proxy.source}" if proxy is not None else "HF_ENDPOINT"
    return NoAnswerError(
        f"cannot fetch {repository} from {constants.ENDPOINT}{through}: {_no_answer_because(error)}",
        f"check the network and {check}; {_CACHE_WORKS}",
    )


def no_hub() -> DownloadError:
    """For a server that answers, but not as the hub does."""
    from huggingface_hub import constants

    return DownloadError(f"{constants.ENDPOINT} does not answer as the hub does", "check HF_ENDPOINT and HF_TOKEN")


def _refused(repository: str, status: int | None) -> DownloadError:
    if status == 401 and _has_token():
        return DownloadError(f"the hub does not accept your token for {repository}", f"check the name; {_LOGIN}")
    if status == 403:
        return DownloadError(f"the hub does not allow the download of {repository} (403)", _LOGIN)
    return DownloadError(
        f"the hub has no repository {repository}, or it is private", f"check the name; if it is private, {_LOGIN}"
    )


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _no_answer_because(error: Exception) -> str:
    """In a few words why there was no answer; nothing that could quote a header."""
    number_text = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None)
    kind = type(error).__name__
    for part, words in (
        ("ConnectTimeout", "no connection in time"),
        ("Timeout", "no answer in time"),
        ("Proxy", "the proxy refuses"),
        ("ConnectError", "no connection"),
        ("RemoteProtocolError", "the connection was cut"),
        ("ReadError", "the connection was cut"),
        ("ProtocolError", "what answers speaks no SOCKS"),
    ):
        if part in kind:
            return f"{words} ({number_text})" if number_text else words
    return str(number_text or kind)
