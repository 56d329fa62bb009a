"""gzip and zstd as streams: what was packed comes out, and a missing end is never taken for the end."""

from __future__ import annotations

import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.batch.compression import (
    DamagedError,
    check_available,
    compressing,
    compression_of,
    plain_suffix,
    read_chunks,
)
from abcli.errors import PromptError, UsageError

relaxed = settings(deadline=None)


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(data)


PACKERS: list[Callable[[bytes], bytes]] = [gzip.compress, zstd]
packers = pytest.mark.parametrize("pack", PACKERS)


class Dribble(io.RawIOBase):
    """Gives a few bytes at a time, as a pipe may."""

    def __init__(self, data: bytes, size: int) -> None:
        self._file = io.BytesIO(data)
        self._size = size

    def read1(self, count: int) -> bytes:
        return self._file.read(min(count, self._size))


def read(data: bytes, size: int = 1 << 16) -> bytes:
    return b"".join(read_chunks(Dribble(data, size), "it"))  # type: ignore[arg-type]


@relaxed
@packers
@given(members=st.lists(st.binary(max_size=300), min_size=1, max_size=4), size=st.integers(1, 50))
def test_members_and_frames_are_joined(pack: Callable[[bytes], bytes], members: list[bytes], size: int) -> None:
    assert read(b"".join(map(pack, members)), size) == b"".join(members)


@packers
def test_every_cut_is_noticed(pack: Callable[[bytes], bytes]) -> None:
    first, second = b"one line\n" * 20, b"another\n" * 20
    whole = pack(first) + pack(second)
    ends = {len(pack(first)): first, len(whole): first + second}
    for cut in range(4, len(whole) + 1):
        if cut in ends:
            assert read(whole[:cut]) == ends[cut]
        else:
            with pytest.raises(DamagedError, match="ends within"):
                read(whole[:cut])


@relaxed
@given(data=st.binary(max_size=100), place=st.integers(0, 200), packed=st.sampled_from(PACKERS))
def test_any_bytes_are_read_or_refused(data: bytes, place: int, packed: Callable[[bytes], bytes]) -> None:
    damaged = bytearray(packed(data))
    damaged[place % len(damaged)] ^= 0x10
    with contextlib.suppress(PromptError):
        read(bytes(damaged))


def test_zeros_after_gzip_are_padding_and_other_bytes_are_damage() -> None:
    packed = gzip.compress(b"text")
    assert read(packed + bytes(5000) + packed + bytes(3)) == b"texttext"
    with pytest.raises(DamagedError, match="damaged gzip"):
        read(packed + b"x" * 20)


def test_a_piece_of_zstd_that_stands_for_much_does_not_come_at_once() -> None:
    packed = zstandard.ZstdCompressor().compress(bytes(1 << 27))
    assert len(packed) < 1 << 14
    sizes = [len(chunk) for chunk in read_chunks(io.BytesIO(packed), "it")]
    assert sum(sizes) == 1 << 27
    assert max(sizes) <= 1 << 26


def test_plain_bytes_under_a_packed_name_are_refused() -> None:
    with pytest.raises(PromptError, match="not gzip data"):
        list(read_chunks(io.BytesIO(b"Hello\n"), "it", "gzip"))
    assert list(read_chunks(io.BytesIO(b""), "it", "gzip")) == []


@pytest.mark.parametrize(("suffix", "unpack"), [(".gz", gzip.decompress), (".zst", None), (".txt", bytes)])
def test_what_is_written_is_what_other_programs_read(
    tmp_path: Path, suffix: str, unpack: Callable[[bytes], bytes] | None
) -> None:
    path = tmp_path / f"out{suffix}"
    with path.open("wb") as file:
        with compressing(file, path) as packed:
            for number in range(50):
                packed.write(f"line {number}\n".encode())
        assert not file.closed
    content = path.read_bytes()
    plain = unpack(content) if unpack else zstandard.ZstdDecompressor().decompressobj().decompress(content)
    assert plain == "".join(f"line {number}\n" for number in range(50)).encode()


def test_without_the_library_zstd_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UsageError) as caught:
        check_available(Path("out.jsonl.zst"))
    assert "pip install 'abcli[zstd]'" in caught.value.hint
    with pytest.raises(UsageError):
        read(zstd(b"x"))
    check_available(Path("out.gz"))


def test_suffixes() -> None:
    assert [compression_of(Path(name)) for name in ("a.gz", "a.ZST", "a.jsonl", "gz")] == ["gzip", "zstd", None, None]
    assert [plain_suffix(Path(name)) for name in ("a.CSV.gz", "a.jsonl", "a.gz")] == [".csv", ".jsonl", ""]


def test_raw_deflate_is_no_gzip() -> None:
    data = zlib.compress(b"x")
    assert read(data) == data
