from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.config import ContextConfig
from abcli.engine import prompt_cache, prompt_file
from abcli.engine.prompt_cache import MIN_TOKENS, STALE_SECONDS, CacheKey, Piece, PromptCache, clear, entries
from abcli.gguf.check import check_file
from abcli.gguf.fingerprint import fingerprint as fingerprint_of
from abcli.native.context import BatchPart, Context
from abcli.native.llama import CancelFlag
from abcli.native.rotating.keys import aligned_bytes
from tests.support.models import open_model

KEY = CacheKey("model", 10000.0, "none", "f16", "f16", "on", "build 1", model_name="tiny.gguf")
LIMIT = 1 << 30
BYTES_PER_TOKEN = 10
ROOT = Path(__file__).resolve().parents[2]


def state(tokens: Sequence[int], start: int, end: int) -> Piece:
    """A piece whose bytes follow from all tokens before its end, as the state of a model does."""
    seed = [len(tokens[:end]), *tokens[:end]]
    data = np.random.default_rng(seed).integers(0, 256, (end - start) * BYTES_PER_TOKEN, np.uint8)
    return Piece(start, end, data)


def pieces_of(tokens: Sequence[int], step: int = 50) -> list[Piece]:
    starts = range(0, len(tokens), step)
    return [state(tokens, start, min(start + step, len(tokens))) for start in starts]


def equal(left: Iterable[Piece], right: Iterable[Piece]) -> bool:
    return [(p.start, p.end, p.data.tobytes()) for p in left] == [(p.start, p.end, p.data.tobytes()) for p in right]


class Cache(PromptCache):
    """A cache that keeps its warnings."""

    def __init__(self, directory: Path, key: CacheKey = KEY, limit: int = LIMIT) -> None:
        self.warnings: list[str] = []
        super().__init__(directory, key, limit, self.warnings.append)

    def store(self, tokens: Sequence[int], step: int = 50) -> list[Piece]:
        pieces = pieces_of(tokens, step)
        self.write(tokens, iter(pieces))
        return pieces

    def load(self, tokens: Sequence[int]) -> list[Piece]:
        entry = self.find(tokens)
        return list(self.read(entry)) if entry is not None else []


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "prompts"


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.prefix"))


def temporaries(directory: Path) -> list[Path]:
    return sorted(directory.glob(".prefix-*.tmp"))


def refuse(*_arguments: object) -> Iterator[Piece]:
    pytest.fail("the pieces were asked for")
    yield


def test_what_is_stored_is_found_again(directory: Path) -> None:
    tokens = list(range(1000, 1230))
    stored = Cache(directory).store(tokens)
    cache = Cache(directory)
    entry = cache.find(tokens)
    assert entry is not None
    assert (entry.length, entry.common) == (230, 230)
    loaded = list(cache.read(entry))
    assert equal(loaded, stored)
    assert all(piece.data.ctypes.data % 64 == 0 and piece.data.flags.writeable for piece in loaded)
    assert cache.warnings == []


def test_nothing_is_found_where_nothing_is(directory: Path) -> None:
    cache = Cache(directory)
    assert cache.find(list(range(500))) is None
    assert not directory.exists()
    assert cache.warnings == []


def test_the_longest_common_prefix_wins(directory: Path) -> None:
    cache = Cache(directory)
    base = list(range(400))
    for length in (80, 200, 300):
        cache.store([*base[:length], 9999, *range(5000, 5100)])
    assert len(files(directory)) == 3
    for wanted, common in ((base, 300), (base[:250], 250), (base[:70], 70), ([*base[:201], 7], 201)):
        entry = cache.find(wanted)
        assert entry is not None
        assert entry.common == common
    assert cache.find([*base[: MIN_TOKENS - 1], 7, 8]) is None
    # All three serve equally well: the one with the fewest tokens too many.
    entry = cache.find(base[:80])
    assert entry is not None
    assert entry.length == 181


@given(common=st.integers(0, 230), step=st.integers(1, 100))
@settings(max_examples=30, deadline=None)
def test_only_pieces_that_begin_in_the_common_part_are_read(
    tmp_path_factory: pytest.TempPathFactory, common: int, step: int
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    tokens = list(range(230))
    stored = Cache(directory).store(tokens, step)
    loaded = Cache(directory).load([*tokens[:common], *itertools.repeat(77777, 10)])
    assert equal(loaded, [piece for piece in stored if piece.start < common] if common >= MIN_TOKENS else [])


@pytest.mark.parametrize(
    "change",
    [
        {"model": "another"},
        {"base": 10001.0},
        {"scaling": "yarn"},
        {"cache_type_k": "f32"},
        {"cache_type_v": "bf16"},
        {"flash_attention": "off"},
        {"build": "build 2"},
    ],
)
def test_another_key_is_not_ours(directory: Path, change: dict[str, object]) -> None:
    tokens = list(range(200))
    stored = Cache(directory).store(tokens)
    other = Cache(directory, replace(KEY, **change))  # type: ignore[arg-type]
    assert other.find(tokens) is None
    other.store(tokens)
    assert len(files(directory)) == 2
    assert other.warnings == []
    assert equal(Cache(directory).load(tokens), stored)


def test_a_file_with_a_name_of_ours_and_another_key_is_not_ours(directory: Path) -> None:
    tokens = list(range(200))
    Cache(directory).store(tokens)
    (file,) = files(directory)
    other = Cache(directory, replace(KEY, build="build 2"))
    file.rename(directory / f"{other._key.digest()[:16]}-{'0' * 32}.prefix")
    assert other.find(tokens) is None
    assert other.warnings == []
    assert len(files(directory)) == 1


def test_the_name_of_the_model_does_not_count(directory: Path) -> None:
    tokens = list(range(200))
    stored = Cache(directory).store(tokens)
    assert equal(Cache(directory, replace(KEY, model_name="renamed.gguf")).load(tokens), stored)


def test_what_is_already_held_is_not_written_again(directory: Path) -> None:
    tokens = list(range(300))
    cache = Cache(directory)
    cache.store(tokens)
    (before,) = files(directory)
    inode = before.stat().st_ino
    cache.write(tokens, refuse())
    cache.write(tokens[:200], refuse())
    cache.write([*tokens, *range(900, 900 + MIN_TOKENS - 1)], refuse())
    cache.write(list(range(7000, 7000 + MIN_TOKENS - 1)), refuse())
    assert [file.stat().st_ino for file in files(directory)] == [inode]
    assert cache.warnings == []


def test_a_longer_entry_takes_the_place_of_what_it_continues(directory: Path) -> None:
    cache = Cache(directory)
    tokens = list(range(500))
    cache.store(tokens[:200])
    cache.store([*tokens[:150], *range(3000, 3100)])
    stored = cache.store(tokens)
    assert sorted(entry.tokens for entry in entries(directory)) == [250, 500]
    assert equal(cache.load(tokens), stored)


FILE_TOKENS = list(range(100, 180))


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, bytes]:
    """A directory to use, the name of a file and its bytes."""
    directory = tmp_path_factory.mktemp("sound")
    Cache(directory).store(FILE_TOKENS)
    (file,) = files(directory)
    return directory, file.name, file.read_bytes()


def check_damaged(directory: Path, name: str, data: bytes, *, rewrite: bool = True) -> list[str]:
    """The warnings about a file with these bytes; nothing wrong comes out of it, and it can be rewritten."""
    for file in files(directory):
        file.unlink()
    (directory / name).write_bytes(data)
    cache = Cache(directory)
    sound = pieces_of(FILE_TOKENS)
    loaded = cache.load(FILE_TOKENS)
    assert equal(loaded, sound[: len(loaded)])
    warnings = list(cache.warnings)
    if warnings:
        assert files(directory) == []
    if rewrite and len(loaded) < len(sound):
        cache.store(FILE_TOKENS)
        assert equal(cache.load(FILE_TOKENS), sound)
    assert cache.warnings == warnings
    assert len(warnings) <= 1
    assert all("\n" not in line for line in warnings)
    return warnings


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_never_gives_wrong_data(sound_file: tuple[Path, str, bytes], data: st.DataObject) -> None:
    directory, name, sound = sound_file
    positions = st.integers(0, len(sound) - 1) | st.integers(0, 63) | st.integers(len(sound) - 1200, len(sound) - 1)
    changed = bytearray(sound)
    for position, mask in data.draw(st.lists(st.tuples(positions, st.integers(1, 255)), min_size=1, max_size=4)):
        changed[position] ^= mask
    check_damaged(directory, name, bytes(changed))


def test_every_changed_byte_is_noticed_or_harmless(sound_file: tuple[Path, str, bytes]) -> None:
    directory, name, sound = sound_file
    stored = pieces_of(FILE_TOKENS)
    holes = sum(-len(piece.data) % 64 for piece in stored)
    silent = []
    for position in range(len(sound)):
        changed = bytearray(sound)
        changed[position] ^= 1 << position % 8
        if not check_damaged(directory, name, bytes(changed), rewrite=position % 16 == 0):
            silent.append(position)
    # The version, for a file of another version is no damage, and the zeros between pieces.
    assert silent[:4] == [8, 9, 10, 11]
    assert len(silent) == 4 + holes


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_file_of_another_length_is_damaged(sound_file: tuple[Path, str, bytes], data: st.DataObject) -> None:
    directory, name, sound = sound_file
    cut = sound[: data.draw(st.integers(0, len(sound) - 1))]
    assert len(check_damaged(directory, name, cut)) == 1
    longer = sound + data.draw(st.binary(min_size=1, max_size=100))
    assert len(check_damaged(directory, name, longer)) == 1
    assert len(check_damaged(directory, name, data.draw(st.binary(max_size=300)))) == 1


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b'{"key": {}, "model": "m", "pieces": 3}',
        b'{"key": [], "model": "m", "pieces": []}',
        b'{"key": {"a": 1}, "model": "m", "pieces": []}',
        b'{"key": {}, "model": "m", "pieces": []}',
        b'{"key": {}, "model": "m", "pieces": [{"start": 0, "end": true, "offset": 64, "size": 1, "sha256": ""}]}',
        b'{"key": {}, "model": "m", "pieces": [{"start": 0, "end": 1, "offset": 64, "size": 1e9, "sha256": ""}]}',
        b'{"key": {}, "model": "m", "pieces": [{"start": 0, "end": 1, "offset": 0, "size": 1, "sha256": ""}]}',
        b'{"key": {}, "model": "m", "pieces": [{"start": 0, "end": 1, "offset": 64, "size": -1, "sha256": ""}]}',
        b'{"key": {}, "model": "m", "pieces": [{"start": 0, "end": 1, "offset": 64, "size": 99, "sha256": ""}]}',
        b'{"key": {}, "model": "m", "pieces": [{"start": 0, "end": 2, "offset": 64, "size": 1, "sha256": ""}]}',
    ],
)
def test_an_index_is_checked_although_its_digest_is_right(directory: Path, index: bytes) -> None:
    directory.mkdir(parents=True)
    tokens = bytes(4)
    prefix = prompt_file._PREFIX.pack(b"ABCLIPFX", prompt_file.VERSION, len(index), 1, 0, 128)
    digest = prompt_file._index_digest(prefix, tokens, index)
    name = f"{KEY.digest()[:16]}-{'0' * 32}.prefix"
    (directory / name).write_bytes(prefix + digest + bytes(64) + tokens + index)
    cache = Cache(directory)
    assert cache.find(list(range(100))) is None
    assert len(cache.warnings) == 1
    assert files(directory) == []


@pytest.mark.parametrize(("count", "size"), [(1 << 31, 0), (0, 1 << 31), ((1 << 24) + 1, 10)])
def test_a_forged_length_asks_for_no_memory(directory: Path, count: int, size: int) -> None:
    directory.mkdir(parents=True)
    path = directory / f"{KEY.digest()[:16]}-{'0' * 32}.prefix"
    with path.open("wb") as file:
        file.write(prompt_file._PREFIX.pack(b"ABCLIPFX", prompt_file.VERSION, size, count, 0, 64))
        file.truncate(64 + 4 * count + size)  # sparse: as long as announced
    cache = Cache(directory)
    assert cache.find(list(range(100))) is None
    assert len(cache.warnings) == 1


def test_the_least_recently_used_goes_first(directory: Path) -> None:
    documents = [list(range(start, start + 200)) for start in (0, 1000, 2000, 3000)]
    cache = Cache(directory)
    for age, tokens in zip((400, 300, 200), documents[:3], strict=True):
        cache.store(tokens)
        newest = max(files(directory), key=lambda file: file.stat().st_mtime_ns)
        moment = time.time() - age
        os.utime(newest, (moment, moment))
    size = files(directory)[0].stat().st_size
    # Reading counts as use, so that the second is the oldest now.
    assert cache.load(documents[0])
    bounded = Cache(directory, limit=3 * size + size // 2)
    bounded.store(documents[3])
    assert [bounded.find(tokens) is not None for tokens in documents] == [True, False, True, True]
    Cache(directory, limit=size + size // 2).store(list(range(4000, 4200)))
    assert len(files(directory)) == 1
    assert Cache(directory).load(list(range(4000, 4200)))


@given(sizes=st.lists(st.integers(MIN_TOKENS, 400), min_size=1, max_size=8), limit=st.integers(0, 12_000))
@settings(max_examples=40, deadline=None)
def test_the_limit_holds_after_every_write(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    cache = Cache(directory, limit=limit)
    for number, size in enumerate(sizes):
        tokens = list(range(1000 * number, 1000 * number + size))
        warned = bool(cache.warnings)
        cache.store(tokens)
        assert sum(file.stat().st_size for file in files(directory)) <= limit
        assert temporaries(directory) == []
        assert cache.find(tokens) is not None or cache.warnings
        assert not warned or len(cache.warnings) == 1


def test_an_entry_beyond_the_limit_is_given_up_early_and_leaves_the_others(directory: Path) -> None:
    Cache(directory).store(list(range(200)))
    held = files(directory)
    cache = Cache(directory, limit=5000)
    asked = []

    def pieces() -> Iterator[Piece]:
        for piece in pieces_of(list(range(5000, 7000))):
            asked.append(piece.start)
            yield piece

    cache.write(list(range(5000, 7000)), pieces())
    assert asked == [0]
    assert files(directory) == held
    assert temporaries(directory) == []
    assert len(cache.warnings) == 1
    assert "5000" in cache.warnings[0]


@pytest.mark.parametrize(
    "bounds",
    [
        [(0, 100)],
        [(50, 200)],
        [(0, 100), (110, 200)],
        [(0, 100), (50, 200)],
        [(0, 100), (100, 201)],
        [(0, 0), (0, 200)],
    ],
)
def test_pieces_that_do_not_tile_the_tokens_are_a_mistake(directory: Path, bounds: list[tuple[int, int]]) -> None:
    tokens = list(range(200))
    cache = Cache(directory)
    with pytest.raises(ValueError, match="piece"):
        cache.write(tokens, [Piece(start, end, np.ones(20, np.uint8)) for start, end in bounds])
    assert list(directory.iterdir()) == []


def test_an_interrupted_writer_leaves_nothing(directory: Path) -> None:
    tokens = list(range(200))

    def pieces() -> Iterator[Piece]:
        yield state(tokens, 0, 50)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cache(directory).write(tokens, pieces())
    assert list(directory.iterdir()) == []


def test_a_disk_that_is_full_costs_one_warning(directory: Path) -> None:
    """The file size limit of the process fails a write in the middle, as a full disk does."""
    held = Cache(directory).store(list(range(200)))
    cache = Cache(directory)
    tokens = list(range(1000, 1200))
    large = [Piece(0, 100, np.ones(1 << 25, np.uint8)), Piece(100, 200, np.ones(1 << 25, np.uint8))]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 24, hard))
    try:
        cache.write(tokens, iter(large))
        cache.write(tokens, iter(large))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(cache.warnings) == 1
    assert str(directory) in cache.warnings[0]
    assert temporaries(directory) == []
    assert cache.find(tokens) is None
    assert equal(cache.load(list(range(200))), held)


def test_a_rename_that_fails_costs_one_warning(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: Path, _target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    cache = Cache(directory)
    cache.store(list(range(200)))
    cache.store(list(range(300, 500)))
    assert cache.warnings == [f"prompt cache: cannot write to {directory}: No space left on device"]
    assert list(directory.iterdir()) == []


def test_a_directory_that_is_a_file_costs_one_warning_each_way(directory: Path) -> None:
    directory.parent.mkdir()
    directory.write_text("not a directory")
    cache = Cache(directory)
    for _ in range(2):
        assert cache.find(list(range(200))) is None
        cache.store(list(range(200)))
    assert len(cache.warnings) == 2
    assert directory.read_text() == "not a directory"


def test_an_entry_that_vanishes_is_no_trouble(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(directory)
    tokens = list(range(200))
    stored = cache.store(tokens)
    entry = cache.find(tokens)
    assert entry is not None
    reading = cache.read(entry)
    first = next(reading)
    entry.path.unlink()
    assert equal([first, *reading], stored)
    assert list(cache.read(entry)) == []
    # Listed, and gone before it is opened.
    monkeypatch.setattr(prompt_cache, "_files", lambda *_: [(entry.path, directory.stat())])
    assert cache.find(tokens) is None
    assert entries(directory) == []
    assert clear(directory)[0] == 1
    assert cache.warnings == []


def test_prompts_are_private(directory: Path) -> None:
    before = os.umask(0)
    try:
        Cache(directory).store(list(range(200)))
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [stat.S_IMODE(file.stat().st_mode) for file in files(directory)] == [0o600]


def test_only_files_of_the_cache_are_touched(directory: Path) -> None:
    directory.mkdir(parents=True)
    name = f"{KEY.digest()[:16]}-{'0' * 32}.prefix"
    (directory / "notes.txt").write_text("mine")
    (directory / f"{name}.bak").write_text("mine")
    (directory / name).symlink_to(directory / "notes.txt")
    os.mkfifo(directory / name.replace("-0", "-1"))
    cache = Cache(directory, limit=7000)
    cache.store(list(range(200)))
    cache.store(list(range(500, 800)))
    assert len([file for file in files(directory) if file.is_file() and not file.is_symlink()]) == 1
    assert cache.warnings == []
    assert clear(directory)[0] == 1
    assert len(list(directory.iterdir())) == 4


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.engine.test_prompt_cache import Cache, state
def pieces(tokens):
    yield state(tokens, 0, 50)
    yield state(tokens, 50, 100)
    os.kill(os.getpid(), signal.SIGKILL)
    yield state(tokens, 100, 200)
Cache(Path(sys.argv[1])).write(list(range(200)), pieces(list(range(200))))
"""


def test_a_killed_writer_leaves_no_entry(directory: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(directory)], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    cache = Cache(directory)
    assert cache.find(list(range(200))) is None
    assert entries(directory) == []
    assert len(temporaries(directory)) == 1
    cache.store(list(range(200)))
    # It might still be written to.
    assert len(temporaries(directory)) == 1
    moment = time.time() - STALE_SECONDS - 1
    os.utime(temporaries(directory)[0], (moment, moment))
    cache.store(list(range(500, 700)))
    assert temporaries(directory) == []
    assert len(files(directory)) == 2
    assert cache.warnings == []


WORKER = """
import random, sys, time
from pathlib import Path
from tests.engine.test_prompt_cache import Cache, equal, pieces_of
directory, seed = Path(sys.argv[1]), int(sys.argv[2])
chance, end, hits = random.Random(seed), time.monotonic() + 3, 0
documents = [list(range(1000 * number, 1000 * number + 200)) for number in range(6)]
expected = [pieces_of(tokens) for tokens in documents]
cache = Cache(directory, limit=8000)
while time.monotonic() < end:
    number = chance.randrange(6)
    loaded = cache.load(documents[number])
    assert not loaded or equal(loaded, expected[number]), number
    hits += bool(loaded)
    if not loaded:
        cache.write(documents[number], iter(expected[number]))
assert cache.warnings == [], cache.warnings
print(hits)
"""


def test_processes_may_share_a_directory(directory: Path) -> None:
    """The limit leaves room for three of six entries, so that both write, read and evict all the time."""
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(directory), str(seed)], cwd=ROOT, stdout=subprocess.PIPE)
        for seed in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0]
    assert all(int(output) > 10 for output in outputs)
    assert temporaries(directory) == []


def test_entries_and_clear(directory: Path) -> None:
    assert entries(directory) == []
    assert clear(directory) == (0, 0)
    cache = Cache(directory)
    cache.store(list(range(200)))
    (old,) = files(directory)
    os.utime(old, (1000.0, 1000.0))
    cache.store(list(range(500, 800)))
    newer, older = entries(directory)
    assert (newer.tokens, older.tokens) == (300, 200)
    assert (older.path, older.size, older.last_use) == (old, old.stat().st_size, 1000.0)
    assert older.model == "tiny.gguf"
    assert older.key == KEY.texts()
    assert older.problem == ""
    damaged = bytearray(old.read_bytes())
    damaged[-1] ^= 1
    old.write_bytes(damaged)
    damaged[8] ^= 1
    (directory / f"{'0' * 16}-{'0' * 32}.prefix").write_bytes(damaged)
    assert [summary.problem.partition(":")[0] for summary in entries(directory) if summary.problem] == [
        "of another version of abcli",
        "damaged",
    ]
    os.utime(old, (1000.0, 1000.0))
    size = old.stat().st_size
    assert clear(directory, older_than=3600.0) == (1, size)
    assert clear(directory)[0] == 2
    assert entries(directory) == []


def test_state_of_a_model_goes_through_a_file(directory: Path, tiny_model: Path) -> None:
    tokens = [3 + number % 250 for number in range(100)]
    with open_model(tiny_model) as model:
        config = ContextConfig(context_size=128)
        first, second = np.empty((2, model.vocabulary_size), np.float32)
        last = [BatchPart(0, 100, [7], output=True)]
        with Context(model, model.native_base, config, 128, 1, CancelFlag()) as context:

            def pieces() -> Iterator[Piece]:
                for start, end in ((0, 64), (64, 100)):
                    context.decode([BatchPart(0, start, tokens[start:end], output=False)], [None])
                    context.take_range(0, start, end)
                    data = aligned_bytes(context.spare_state_size())
                    context.read_spare(data)
                    yield Piece(start, end, data)
                context.drop_spare()

            Cache(directory).write(tokens, pieces())
            context.decode(last, [first])
        with Context(model, model.native_base, config, 128, 1, CancelFlag()) as context:
            for piece in Cache(directory).load(tokens):
                context.write_spare(piece.data)
                context.append_spare(0)
            assert context.length(0) == 100
            context.decode(last, [second])
    assert np.array_equal(first, second)


def test_the_fingerprint_of_a_model(tiny_model: Path, tmp_path: Path) -> None:
    (header,) = files = check_file(tiny_model)
    copy = tmp_path / "renamed.gguf"
    copy.write_bytes(tiny_model.read_bytes())
    original = fingerprint_of(files)
    assert fingerprint_of(check_file(copy)) == original
    sound = bytearray(copy.read_bytes())
    for tensor in header.tensors:
        changed = bytearray(sound)
        start = header.data_offset + tensor.offset
        changed[start : start + tensor.size_bytes] = bytes(255 - byte for byte in changed[start:][: tensor.size_bytes])
        copy.write_bytes(changed)
        assert fingerprint_of([replace(header, path=copy)]) != original, tensor.name
    copy.write_bytes(sound + bytes(32))
    assert fingerprint_of([replace(header, path=copy)]) != original
    changed = bytearray(sound)
    place = changed.index(b"general.architecture")
    changed[place] ^= 1
    copy.write_bytes(changed)
    assert fingerprint_of([replace(header, path=copy)]) != original
