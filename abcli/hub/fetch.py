"""Fetches models from the hub into its standard cache, in a way that survives cut connections and killed processes.

huggingface_hub starts a download anew in every process. So the file itself is fetched here, with its session, headers
and addresses, into `blobs/<hash>.incomplete` of its cache; once the hash is right the file becomes the blob, and
huggingface_hub, which finds it there, makes the link and the reference.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from abcli.errors import DownloadError
from abcli.hub.cache import cache_directory, cached_file, hub_settings, repository_folder
from abcli.hub.names import HubName, choose_files
from abcli.hub.transfer import NoAnswerError, no_hub, open_session, receive, reporting

_CHUNK = 1 << 20
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHA256_DIGITS = 64
_SPARE_BYTES = 16 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub; `digest` is its SHA-256 in hexadecimal, or git's blob hash if it is not in large storage."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Download:
    """What is to be fetched for a name; `missing` is the number of bytes that are not here yet."""

    name: HubName
    commit: str
    files: tuple[RemoteFile, ...]
    missing: int

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


class Watcher(Protocol):
    """Is told how a download goes; `done` and `total` are bytes of all its files, those already here included."""

    def begin(self, download: Download) -> None:
        """What is to be fetched is known; called only if something is missing."""

    def progress(self, done: int, total: int) -> None:
        """More bytes are here."""

    def note(self, text: str) -> None:
        """Something a person may want to know."""


def fetch(name: HubName, watcher: Watcher) -> Path:
    """Make sure that the cache holds what `name` means on the hub now; the file, or the first part.

    In offline mode (HF_HUB_OFFLINE) nothing is asked, and what is in the cache has to do; so it has, with a note, where
    no answer comes. Raises DownloadError, ModelFileError if the repository has no such file, and UsageError for an
    impossible name. What an interrupted download has brought stays for the next.
    """
    if hub_settings().HF_HUB_OFFLINE:
        return _offline(name)
    from huggingface_hub import logging

    if not any(os.environ.get(key) for key in ("HF_DEBUG", "HF_HUB_VERBOSITY")):
        # What goes wrong is told once, by the exception.
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with reporting(name.repository):
            download = look_up(name)
    except NoAnswerError as error:
        here = cached_file(name)
        if here is None:
            raise
        watcher.note(f"{error.message}; taking what is in the cache")
        return here
    with reporting(name.repository):
        if download.missing:
            _require_space(download)
            watcher.begin(download)
        before = 0
        for file in download.files:
            _fetch_blob(download, file, watcher, before)
            before += file.size
        first, *_others = [_link(download, file) for file in download.files]
        return first


def look_up(name: HubName) -> Download:
    """Ask the hub, with one request, which files `name` means. Raises ModelFileError and what the library raises."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError

    open_session()
    try:
        info = HfApi().model_info(
            name.repository,
            revision=name.revision or None,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
    except (OSError, UnicodeError, HFValidationError):
        raise
    except (ValueError, TypeError, KeyError, AttributeError):
        # The answer is no JSON, or not the hub's.
        raise no_hub() from None
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    files = tuple(_remote_file(siblings[path]) for path in choose_files(name, list(siblings)))
    if not info.sha:
        raise DownloadError(f"the hub names no commit for {name.repository}", "check HF_ENDPOINT")
    missing = sum(file.size - _size_here(name.repository, info.sha, file) for file in files)
    return Download(name, info.sha, files, missing)


def _remote_file(sibling: Any) -> RemoteFile:
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if not isinstance(digest, str) or not _HASH.fullmatch(digest) or not isinstance(sibling.size, int):
        raise DownloadError(f"the hub gives no size and checksum for {sibling.rfilename}", "check HF_ENDPOINT")
    return RemoteFile(sibling.rfilename, sibling.size, digest)


def _offline(name: HubName) -> Path:
    found = cached_file(name)
    if found is None:
        raise DownloadError(f"{name} is not in {cache_directory()}", "HF_HUB_OFFLINE is set: unset it to fetch it")
    return found


def _require_space(download: Download) -> None:
    """Refuse to begin what the disk cannot hold. Raises DownloadError."""
    folder = cache_directory()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < download.missing + _SPARE_BYTES:
        raise DownloadError(
            f"{download.name} needs {download.missing / 1e6:,.0f} MB more, but {folder} has {free / 1e6:,.0f} MB free",
            "make room (`abcli models` shows what is there), or set HF_HOME to a folder on a larger disk",
        )


def _blob(repository: str, file: RemoteFile) -> Path:
    return repository_folder(repository) / "blobs" / file.digest


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _is_here(repository: str, commit: str, file: RemoteFile) -> bool:
    """Whether the whole file is in the cache, as a blob or, where there are no links, in the snapshot."""
    snapshot = repository_folder(repository) / "snapshots" / commit / file.path
    return any(_size(path) == file.size for path in (_blob(repository, file), snapshot))


def _size_here(repository: str, commit: str, file: RemoteFile) -> int:
    """How many bytes of a file need not be fetched."""
    if _is_here(repository, commit, file):
        return file.size
    return min(file.size, _size(_partial(_blob(repository, file))))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _fetch_blob(download: Download, file: RemoteFile, watcher: Watcher, before: int) -> None:
    """Bring one file into the cache if it is not there; `before` is the number of bytes of the files before it.

    Raises DownloadError, with the file removed if it is not what the hub promised.
    """
    from huggingface_hub import constants, hf_hub_url

    if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return  # The hub gives such files only to the library, which fetches them when it makes the link.
    repository = download.name.repository
    blob = _blob(repository, file)
    with _reporting_disk(blob), _locked(repository, file, watcher):
        # Another process may have fetched it while this one waited.
        if not _is_here(repository, download.commit, file):
            # One of another size is damaged, and the library would take it as it is.
            blob.unlink(missing_ok=True)
            partial = _partial(blob)
            blob.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("ab") as stream:
                receive(
                    hf_hub_url(repository, file.path, revision=download.commit),
                    stream,
                    file.size,
                    lambda size: watcher.progress(before + size, download.size),
                )
                os.fsync(stream.fileno())
            _check(partial, file)
            partial.replace(blob)
    watcher.progress(before + file.size, download.size)


def _check(path: Path, file: RemoteFile) -> None:
    """Compare a file with the hub's hash of it. Raises DownloadError after removing it."""
    digest = hashlib.sha256() if len(file.digest) == _SHA256_DIGITS else _git_digest(file.size)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != file.digest:
        blob = path.resolve()
        path.unlink()
        blob.unlink(missing_ok=True)
        raise DownloadError(
            f"{file.path} arrived with another checksum than the hub's: {digest.hexdigest()} instead of {file.digest}",
            "it was removed; fetch it again, and if that does not help, do not trust this network or mirror",
        )


def _git_digest(size: int) -> Any:
    return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)


def _link(download: Download, file: RemoteFile) -> Path:
    """Let the library make the link to a blob, and note what the branch stands for; the path of the link."""
    from huggingface_hub import hf_hub_download

    name = download.name
    blob = _blob(name.repository, file)
    was_there = blob.exists()
    try:
        path = Path(hf_hub_download(name.repository, file.path, revision=name.revision or None))
    except ValueError as error:
        if isinstance(error, OSError) or was_there:
            raise
        raise DownloadError(
            f"{file.path} is too large for a plain download", "install hf_xet: `pip install hf_xet`"
        ) from None
    if download.commit not in path.parts:
        raise DownloadError(f"{name.repository} was changed while it was fetched", "fetch it again")
    if not was_there:
        _check(path, file)
    elif not path.is_symlink() and not path.samefile(blob):
        # Where there are no links the library makes a copy.
        blob.unlink()
    return path


@contextmanager
def _locked(repository: str, file: RemoteFile, watcher: Watcher) -> Iterator[None]:
    """Keep other processes, also those of the library, from fetching the same file."""
    folder = cache_directory() / ".locks" / repository_folder(repository).name
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{file.digest}.lock", mode=0o664)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        watcher.note(f"another process is fetching {file.path}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _reporting_disk(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into DownloadError; the network's errors pass."""
    try:
        yield
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        hint = "check the permissions of the hub's cache"
        raise DownloadError(f"cannot write {path}: {error.strerror}", hint) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO):
            raise
        raise DownloadError(
            f"cannot write {path}: {error.strerror}", "make room; what is already here stays for the next try"
        ) from error
