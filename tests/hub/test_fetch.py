"""Models are fetched whole and right, whatever happens on the way, and what is here is used without a request."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import pytest
from filelock import FileLock
from huggingface_hub import constants

from abcli.errors import AbcliError, DownloadError, ModelFileError, UsageError
from abcli.hub import fetch as hub_module
from abcli.hub.cache import cached_file, cached_models, repository_folder
from abcli.hub.fetch import Download, fetch
from abcli.hub.names import HubName
from tests.support.hub import TOKEN, Fault, HubStandIn

NAME = HubName("user/model-GGUF")
FILE = "model-Q4_K_M.gguf"
CONTENT = os.urandom(100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PARTS = {f"big/big-Q8_0-{number:05d}-of-00003.gguf": os.urandom(10_000 * number) for number in (1, 2, 3)}


@dataclass
class Log:
    """Remembers what it is told."""

    downloads: list[Download] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def begin(self, download: Download) -> None:
        self.downloads.append(download)

    def progress(self, done: int, total: int) -> None:
        self.steps.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


def blobs(cache: Path) -> Path:
    return cache / "models--user--model-GGUF" / "blobs"


def partial(cache: Path) -> Path:
    return blobs(cache) / f"{SHA256}.incomplete"


def ranges(hub: HubStandIn) -> list[str | None]:
    return [request.headers.get("range") for request in hub.content_requests()]


@pytest.fixture
def commit(hub: HubStandIn, cache: Path) -> str:
    """A repository with one model; its commit."""
    return hub.add(NAME.repository, {FILE: CONTENT, "README.md": b"a model"})


@pytest.mark.parametrize("redirects", [True, False])
def test_a_model_lands_in_the_standard_cache(hub: HubStandIn, cache: Path, commit: str, redirects: bool) -> None:
    hub.redirects = redirects
    log = Log()
    path = fetch(NAME, log)
    assert path == cache / "models--user--model-GGUF" / "snapshots" / commit / FILE
    assert path.read_bytes() == CONTENT
    assert path.resolve() == blobs(cache) / SHA256
    assert [one.name for one in blobs(cache).iterdir()] == [SHA256]
    assert (cache / "models--user--model-GGUF" / "refs" / "main").read_text() == commit
    assert log.downloads[0].size == log.downloads[0].missing == len(CONTENT)
    assert log.steps == sorted(log.steps)
    assert log.steps[-1] == (len(CONTENT), len(CONTENT))
    # What others have put there is found by the library itself, and the other way round.
    from huggingface_hub import try_to_load_from_cache

    assert try_to_load_from_cache(NAME.repository, FILE) == str(path)


def test_what_is_here_is_not_fetched_again(hub: HubStandIn, cache: Path, commit: str) -> None:
    first = fetch(NAME, Log())
    hub.requests.clear()
    log = Log()
    assert fetch(NAME, log) == first
    assert hub.content_requests() == []
    assert log.downloads == []
    hub.requests.clear()
    assert cached_file(NAME) == first
    assert hub.requests == []


def test_a_new_commit_with_the_same_file_costs_nothing(hub: HubStandIn, cache: Path, commit: str) -> None:
    fetch(NAME, Log())
    newer = hub.add(NAME.repository, {FILE: CONTENT, "README.md": b"better words"})
    hub.requests.clear()
    assert newer in fetch(NAME, Log()).parts
    assert hub.content_requests() == []
    assert len(list(blobs(cache).iterdir())) == 1


@pytest.mark.parametrize("redirects", [True, False])
def test_a_cut_connection_goes_on_where_it_was(hub: HubStandIn, cache: Path, commit: str, redirects: bool) -> None:
    hub.redirects = redirects
    hub.faults.extend([Fault(cut_after=30_000), Fault(cut_after=20_000), Fault(cut_after=0), Fault(cut_after=1)])
    assert fetch(NAME, Log()).read_bytes() == CONTENT
    assert ranges(hub) == [None, "bytes=30000-", "bytes=50000-", "bytes=50000-", "bytes=50001-"]


def test_what_came_stays_for_the_next_try(hub: HubStandIn, cache: Path, commit: str) -> None:
    hub.faults.extend([Fault(cut_after=40_000), *[Fault(cut_after=0)] * 4])
    with pytest.raises(DownloadError) as caught:
        fetch(NAME, Log())
    assert "the connection was cut" in caught.value.message
    assert caught.value.hint
    assert partial(cache).read_bytes() == CONTENT[:40_000]
    assert cached_file(NAME) is None
    hub.requests.clear()
    log = Log()
    assert fetch(NAME, log).read_bytes() == CONTENT
    assert ranges(hub) == ["bytes=40000-"]
    assert log.downloads[0].missing == 60_000
    assert log.steps[0][0] > 40_000
    assert not partial(cache).exists()


def test_a_server_that_knows_no_ranges_sends_all_again(hub: HubStandIn, cache: Path, commit: str) -> None:
    hub.faults.extend([Fault(cut_after=40_000), Fault(ignore_range=True)])
    assert fetch(NAME, Log()).read_bytes() == CONTENT


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"more"])
def test_a_rest_that_is_whole_or_too_long(hub: HubStandIn, cache: Path, commit: str, left: bytes) -> None:
    blobs(cache).mkdir(parents=True)
    partial(cache).write_bytes(left)
    assert fetch(NAME, Log()).read_bytes() == CONTENT
    assert len(hub.content_requests()) == (0 if left == CONTENT else 1)


def test_wrong_bytes_are_removed(hub: HubStandIn, cache: Path, commit: str) -> None:
    hub.faults.append(Fault(wrong_bytes=True))
    with pytest.raises(DownloadError) as caught:
        fetch(NAME, Log())
    assert "checksum" in caught.value.message
    assert SHA256 in caught.value.message
    assert list(blobs(cache).iterdir()) == []
    assert cached_file(NAME) is None
    assert fetch(NAME, Log()).read_bytes() == CONTENT


def test_a_damaged_rest_is_not_taken_for_good(hub: HubStandIn, cache: Path, commit: str) -> None:
    blobs(cache).mkdir(parents=True)
    partial(cache).write_bytes(b"x" * 50_000)
    with pytest.raises(DownloadError, match="checksum"):
        fetch(NAME, Log())
    assert fetch(NAME, Log()).read_bytes() == CONTENT


def test_a_file_outside_large_storage_is_checked_by_its_git_hash(hub: HubStandIn, cache: Path) -> None:
    hub.add(NAME.repository, {FILE: CONTENT}, large_storage=False)
    hub.faults.append(Fault(wrong_bytes=True))
    with pytest.raises(DownloadError, match="checksum"):
        fetch(NAME, Log())
    assert fetch(NAME, Log()).read_bytes() == CONTENT


def test_a_truncated_blob_is_replaced(hub: HubStandIn, cache: Path, commit: str) -> None:
    path = fetch(NAME, Log())
    path.resolve().write_bytes(CONTENT[:10])
    assert fetch(NAME, Log()).read_bytes() == CONTENT


def test_more_than_was_announced_is_refused(hub: HubStandIn, cache: Path, commit: str) -> None:
    hub.faults.append(Fault(extra=b"x" * 10))
    with pytest.raises(DownloadError, match="more than"):
        fetch(NAME, Log())
    assert fetch(NAME, Log()).read_bytes() == CONTENT


def test_less_than_was_announced_is_asked_for_again(hub: HubStandIn, cache: Path, commit: str) -> None:
    hub.faults.extend([Fault(length=70_000), Fault(length=5_000)])
    assert fetch(NAME, Log()).read_bytes() == CONTENT
    assert ranges(hub) == [None, "bytes=70000-", "bytes=75000-"]


def test_a_server_that_sends_nothing_is_given_up(hub: HubStandIn, cache: Path, commit: str) -> None:
    hub.faults.extend([Fault(length=10), *[Fault(length=0)] * 4])
    with pytest.raises(DownloadError, match="sent 10 of 100,000 bytes and no more"):
        fetch(NAME, Log())


def test_a_silent_server_is_a_timeout(
    hub: HubStandIn, cache: Path, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.faults.extend([Fault(hang_after=0)] * 4)
    with pytest.raises(DownloadError, match="no answer in time"):
        fetch(NAME, Log())


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_trouble_is_waited_for(hub: HubStandIn, cache: Path, commit: str, status: int) -> None:
    hub.faults.extend([Fault(status=status)] * 3)
    assert fetch(NAME, Log()).read_bytes() == CONTENT


@pytest.mark.parametrize("where", ["api", "head", "content"])
@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "private"), (403, "403"), (404, "no repository"), (429, "too many"), (500, "500"), (503, "503")],
)
def test_a_lasting_status_is_one_clear_error(
    hub: HubStandIn, cache: Path, commit: str, where: str, status: int, words: str
) -> None:
    if where == "api":
        hub.api_status = status
    elif where == "head":
        hub.head_status = status
    else:
        hub.faults.extend([Fault(status=status)] * 4)
    with pytest.raises(DownloadError) as caught:
        fetch(NAME, Log())
    assert words in caught.value.message
    assert caught.value.hint
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"3", b'{"id": 1}', b'{"id": "a", "siblings": 3}'])
def test_a_server_that_is_no_hub(hub: HubStandIn, cache: Path, body: bytes) -> None:
    hub.api_body = body
    with pytest.raises(AbcliError) as caught:
        fetch(NAME, Log())
    assert isinstance(caught.value, (DownloadError, ModelFileError))


def test_a_hub_that_gives_no_checksums(hub: HubStandIn, cache: Path) -> None:
    hub.api_body = b'{"id": "user/model-GGUF", "sha": "0", "siblings": [{"rfilename": "model-Q4_K_M.gguf"}]}'
    with pytest.raises(DownloadError, match="no size and checksum"):
        fetch(NAME, Log())


def test_a_gated_repository_says_what_to_do(hub: HubStandIn, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME.repository, {FILE: CONTENT}, gated=True)
    with pytest.raises(DownloadError) as caught:
        fetch(NAME, Log())
    assert "gated" in caught.value.message
    assert "HF_TOKEN" in caught.value.hint
    assert "https://huggingface.co/user/model-GGUF" in caught.value.hint

    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(DownloadError) as caught:
        fetch(NAME, Log())
    assert "no access" in caught.value.hint
    assert "hf_of" not in caught.value.message + caught.value.hint

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch(NAME, Log()).read_bytes() == CONTENT
    # The token is for the hub alone, not for whom it redirects to.
    for request in hub.requests:
        assert "authorization" not in request.headers or request.server == "hub"
    assert any(request.headers.get("authorization") == f"Bearer {TOKEN}" for request in hub.requests)


def test_a_token_that_cannot_be_sent_is_not_shown(
    hub: HubStandIn, cache: Path, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_ü"
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(DownloadError) as caught:
        fetch(NAME, Log())
    assert "token" in caught.value.message
    assert "HF_TOKEN" in caught.value.hint
    assert token not in caught.value.message + caught.value.hint
    assert caught.value.__suppress_context__


def test_no_network(hub: HubStandIn, cache: Path, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch(NAME, Log())
    # Port 9 is that of the discard service, which nobody runs.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert cached_file(NAME) == path
    log = Log()
    assert fetch(NAME, log) == path
    assert log.downloads == []
    assert log.notes == [
        f"cannot fetch {NAME.repository} from http://127.0.0.1:9: no connection; taking what is in the cache"
    ]
    with pytest.raises(DownloadError) as caught:
        fetch(HubName("user/other-GGUF"), Log())
    assert "no connection" in caught.value.message
    assert "127.0.0.1:9" in caught.value.message


# What the environment says of the way to the hub, and the words with which it is told.
BROKEN_WAYS = {
    "a SOCKS proxy without a library for it": ({"ALL_PROXY": "socks5h://me:secret@127.0.0.1:9"}, "needs a library"),
    "a dead SOCKS proxy": ({"all_proxy": "socks5://127.0.0.1:9"}, "through the proxy socks5://127.0.0.1:9"),
    "a dead proxy": ({"HTTP_PROXY": "http://me:secret@127.0.0.1:9"}, "through the proxy http://127.0.0.1:9"),
    "a proxy of another kind": ({"HTTPS_PROXY": "gopher://me:secret@127.0.0.1"}, "HTTPS_PROXY=gopher://127.0.0.1"),
    "an impossible proxy": ({"ALL_PROXY": "http://127.0.0.1:no"}, "ALL_PROXY=http://127.0.0.1:no"),
    "missing certificates": ({"SSL_CERT_FILE": "/nowhere.pem"}, "certificates"),
}


@pytest.mark.parametrize("case", BROKEN_WAYS)
def test_a_broken_way_to_the_hub_is_named_and_the_cache_serves(
    hub: HubStandIn, cache: Path, commit: str, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    variables, words = BROKEN_WAYS[case]
    path = fetch(NAME, Log())
    monkeypatch.delenv("NO_PROXY")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "without a library" in case:
        monkeypatch.setitem(sys.modules, "socksio", None)
    # The client is made anew, with these settings.
    huggingface_hub.close_session()
    log = Log()
    assert fetch(NAME, log) == path
    assert words in log.notes[0]
    with pytest.raises(DownloadError) as caught:
        fetch(HubName("user/other-GGUF"), Log())
    assert words in caught.value.message
    assert next(iter(variables)) in caught.value.hint
    assert "HF_ENDPOINT" not in caught.value.hint
    assert "secret" not in caught.value.message + caught.value.hint + log.notes[0]


# The client forgets to close a socket on which no SOCKS was spoken.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("answer", "words"), [(b"HTTP/1.1 407 No\r\n\r\n", "wants a login"), (b"HTTP/1.1", "SOCKS")])
def test_a_proxy_that_does_not_do_its_work(
    cache: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, words: str
) -> None:
    served = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)

        def serve() -> None:
            # An answer that is none is asked for again.
            while not served.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _address = server.accept()
                    with connection:
                        connection.settimeout(10)
                        connection.recv(4096)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        kind = "http" if b"407" in answer else "socks5"
        monkeypatch.setenv("ALL_PROXY", f"{kind}://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.delenv("NO_PROXY")
        try:
            with pytest.raises(DownloadError) as caught:
                fetch(NAME, Log())
        finally:
            served.set()
            thread.join()
    assert words in caught.value.message
    assert "ALL_PROXY" in caught.value.hint
    del caught
    gc.collect()


@pytest.mark.parametrize("address", ["http://[x", "http://x:99999", "ftp://x", "huggingface.co"])
def test_an_impossible_address_of_the_hub(address: str, tmp_path: Path) -> None:
    # The library reads it when it is imported.
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "abcli", "pull", str(NAME)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert "internal" not in error
    assert "HF_" in error + hint


def test_a_hub_in_trouble_is_no_reason_for_an_old_version(hub: HubStandIn, cache: Path, commit: str) -> None:
    fetch(NAME, Log())
    hub.api_status = 503
    with pytest.raises(DownloadError, match="503"):
        fetch(NAME, Log())


def test_offline_mode_asks_nothing(hub: HubStandIn, cache: Path, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch(NAME, Log())
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(NAME, Log()) == path
    with pytest.raises(DownloadError) as caught:
        fetch(HubName("user/model-GGUF", quant="Q8_0"), Log())
    assert "HF_HUB_OFFLINE" in caught.value.hint
    assert hub.requests == []


def test_a_revision_is_pinned_and_recorded(hub: HubStandIn, cache: Path, commit: str) -> None:
    newer = hub.add(NAME.repository, {FILE: b"new" + CONTENT})
    hub.repositories[NAME.repository].refs["v1"] = commit
    pinned = HubName(NAME.repository, revision=commit)
    old = fetch(pinned, Log())
    assert commit in old.parts
    assert cached_file(NAME) == cached_file(pinned) == old
    assert cached_file(HubName(NAME.repository, revision=commit[:8])) == old
    tagged = HubName(NAME.repository, revision="v1")
    assert cached_file(tagged) is None
    assert fetch(tagged, Log()) == cached_file(tagged) == old
    new = fetch(NAME, Log())
    assert newer in new.parts
    assert cached_file(NAME) == new
    assert cached_file(pinned) == old
    assert {(model.commit, model.refs) for model in cached_models()} == {(commit, ("v1",)), (newer, ("main",))}
    with pytest.raises(DownloadError, match="no such revision"):
        fetch(HubName(NAME.repository, revision="v2"), Log())


def test_a_split_model_comes_whole(hub: HubStandIn, cache: Path) -> None:
    hub.add(NAME.repository, {**PARTS, FILE: CONTENT, "mmproj-Q8_0.gguf": b"x"})
    name = HubName(NAME.repository, quant="Q8_0")
    hub.faults.extend([Fault(), Fault(cut_after=5_000), *[Fault(cut_after=0)] * 4])
    with pytest.raises(DownloadError):
        fetch(name, Log())
    assert cached_file(name) is None
    log = Log()
    path = fetch(name, log)
    assert (log.downloads[0].size, log.downloads[0].missing) == (60_000, 45_000)
    assert log.steps[-1] == (60_000, 60_000)
    assert path.name.endswith("-00001-of-00003.gguf")
    assert [(path.parent / Path(part).name).read_bytes() for part in PARTS] == list(PARTS.values())
    (model,) = cached_models()
    assert len(model.files) == 3
    # Without its last part it is no model.
    model.files[2].unlink()
    assert cached_file(name) is None
    assert cached_models() == []


def test_too_little_space_is_said_before(
    hub: HubStandIn, cache: Path, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10, 9, 1 << 20))
    log = Log()
    with pytest.raises(DownloadError) as caught:
        fetch(NAME, log)
    assert "1 MB free" in caught.value.message
    assert "HF_HOME" in caught.value.hint
    assert log.downloads == []
    assert hub.content_requests() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(hub: HubStandIn, cache: Path, commit: str) -> None:
    cache.mkdir()
    cache.chmod(0o500)
    with pytest.raises(DownloadError, match="Permission denied"):
        fetch(NAME, Log())


def test_a_file_where_the_cache_should_be(hub: HubStandIn, cache: Path, commit: str) -> None:
    cache.write_bytes(b"")
    with pytest.raises(DownloadError, match=str(cache)):
        fetch(NAME, Log())


def test_a_full_disk_is_said(hub: HubStandIn, cache: Path, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_module, "receive", full)
    with pytest.raises(DownloadError, match="No space left on device"):
        fetch(NAME, Log())


def test_another_process_is_waited_for(hub: HubStandIn, cache: Path, commit: str) -> None:
    lock = cache / ".locks" / repository_folder(NAME.repository).name / f"{SHA256}.lock"
    lock.parent.mkdir(parents=True)
    other = FileLock(lock)
    other.acquire()

    class Releasing(Log):
        def note(self, text: str) -> None:
            super().note(text)
            other.release()

    log = Releasing()
    assert fetch(NAME, log).read_bytes() == CONTENT
    assert "another process" in log.notes[0]


def test_without_links_nothing_is_kept_twice(
    hub: HubStandIn, cache: Path, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda _cache: False)
    path = fetch(NAME, Log())
    assert path.read_bytes() == CONTENT
    assert not path.is_symlink()
    assert list(blobs(cache).iterdir()) == []
    hub.requests.clear()
    assert fetch(NAME, Log()) == path
    assert hub.content_requests() == []


def test_names_that_fit_nothing(hub: HubStandIn, cache: Path, commit: str) -> None:
    hub.add("user/empty", {"README.md": b""})
    for name in (
        HubName(NAME.repository, quant="Q8_0"),
        HubName(NAME.repository, file="x.gguf"),
        HubName("user/empty"),
    ):
        with pytest.raises(ModelFileError) as caught:
            fetch(name, Log())
        assert caught.value.hint
    with pytest.raises(UsageError):
        fetch(HubName("user/a--b"), Log())


def test_a_file_too_large_for_a_plain_download(
    hub: HubStandIn, cache: Path, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Here the library has no transport of its own either.
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", len(CONTENT) - 1)
    with pytest.raises(DownloadError, match="too large") as caught:
        fetch(NAME, Log())
    assert "hf_xet" in caught.value.hint


@pytest.mark.parametrize("right", [True, False])
def test_what_the_library_fetches_is_checked_too(
    hub: HubStandIn, cache: Path, commit: str, monkeypatch: pytest.MonkeyPatch, right: bool
) -> None:
    monkeypatch.setattr(hub_module, "_fetch_blob", lambda *_arguments: None)
    hub.faults.append(Fault(wrong_bytes=not right))
    if right:
        assert fetch(NAME, Log()).read_bytes() == CONTENT
        return
    with pytest.raises(DownloadError, match="checksum"):
        fetch(NAME, Log())
    assert list(blobs(cache).iterdir()) == []
    assert cached_file(NAME) is None
