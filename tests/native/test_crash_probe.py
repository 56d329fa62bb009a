"""The trial in a child process: what crashes there is an error here, and what passed is not tried again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from abcli import config
from abcli.config import LoraConfig
from abcli.errors import ModelFileError, OutOfMemoryError, UnsupportedModelError
from abcli.gguf import lora as adapters
from abcli.gguf.header import read_header
from abcli.native import crash_probe as trial
from tests.support.lora import random_lora, write_lora
from tests.support.models import checked_model
from tests.support.tiny_gguf import write_tiny_mamba, write_tiny_model

pytestmark = pytest.mark.usefixtures("nothing_found_out")


def try_file(path: Path) -> None:
    """What a command does with a model before it loads it."""
    trial.ensure_loadable(checked_model(path))


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process ids of the children started during a test."""
    started: list[int] = []
    original = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> Any:
        process = original(*arguments, **options)
        started.append(process.pid)
        return process

    monkeypatch.setattr(trial.subprocess, "Popen", start)
    return started


def test_a_sound_model_passes_and_is_remembered(tmp_path: Path, children: list[int]) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    try_file(path)
    assert len(list(config.trial_directory().iterdir())) == 1
    try_file(path)
    assert len(children) == 1
    path.write_bytes(path.read_bytes() + bytes(32))
    try_file(path)
    assert len(children) == 2


@pytest.mark.parametrize("kind", ["recurrent", "sentence pieces", "neox", "no rope"])
def test_other_sound_models_pass(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    if kind == "recurrent":
        write_tiny_mamba(path)
    elif kind == "sentence pieces":
        write_tiny_model(path, tokenizer="llama", dtype="q8_0")
    else:
        write_tiny_model(path, architecture="qwen2" if kind == "neox" else "gpt2")
    try_file(path)


def test_an_assertion_in_llama_cpp_is_an_error_here(tmp_path: Path) -> None:
    # Bloom takes the last layer's heads for all of them, so that the first layer's views do not fit.
    path = write_tiny_model(
        tmp_path / "m.gguf", architecture="bloom", metadata={"bloom.attention.head_count_kv": [2, 1]}
    )
    with pytest.raises(ModelFileError, match=r"ggml\.c:\d+: GGML_ASSERT") as caught:
        try_file(path)
    assert caught.value.hint
    assert not config.trial_directory().exists()


def test_an_architecture_llama_cpp_does_not_know(tmp_path: Path) -> None:
    header_keys = {"context_length": 64, "embedding_length": 64, "block_count": 2}
    metadata = {f"newest.{key}": value for key, value in header_keys.items()}
    path = write_tiny_model(tmp_path / "m.gguf", metadata={"general.architecture": "newest", **metadata})
    with pytest.raises(UnsupportedModelError, match="unknown model architecture: 'newest'"):
        try_file(path)


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    broken = np.full(64, np.nan, np.float32)
    path = write_tiny_model(tmp_path / "m.gguf", tensors={"output_norm.weight": broken})
    with pytest.raises(ModelFileError, match="not numbers"):
        try_file(path)


def test_a_missing_tensor(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", tensors={"blk.1.ffn_up.weight": None})
    with pytest.raises(ModelFileError, match=r"tensor 'blk\.1\.ffn_up\.weight' not found"):
        try_file(path)


def test_an_encoder_decoder_model_is_named(tmp_path: Path) -> None:
    error = trial._failure(tmp_path, (), trial.STATUS_UNSUPPORTED, "x\nan encoder\n")
    assert isinstance(error, UnsupportedModelError)
    assert "is an encoder" in error.message


def test_memory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    config.home().mkdir(exist_ok=True)
    config.trial_directory().write_text("a file where the directory should be")
    try_file(write_tiny_model(tmp_path / "m.gguf"))


def test_a_module_in_the_working_directory_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise RuntimeError('taken')")
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "m.gguf")
    try_file(Path("m.gguf"))


def test_a_child_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: list[int]
) -> None:
    monkeypatch.setattr(trial, "BASE_SECONDS", 0.01)
    with pytest.raises(ModelFileError, match="did not finish in 0 seconds"):
        try_file(write_tiny_model(tmp_path / "m.gguf"))
    assert not psutil.pid_exists(children[0])


def test_a_child_that_takes_all_memory_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: list[int]
) -> None:
    monkeypatch.setattr(trial, "SPARE_BYTES", 2**20)
    with pytest.raises(ModelFileError, match="more and more memory"):
        try_file(write_tiny_model(tmp_path / "m.gguf"))
    assert not psutil.pid_exists(children[0])


def test_an_interrupt_ends_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: list[int]) -> None:
    def interrupt(_process_id: int) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "_memory_used", interrupt)
    with pytest.raises(KeyboardInterrupt):
        try_file(write_tiny_model(tmp_path / "m.gguf"))
    assert not psutil.pid_exists(children[0])


REASONS = {
    "/src/ggml/src/ggml.c:40: GGML_ASSERT(a == b) failed\n": "ggml.c:40: GGML_ASSERT(a == b) failed",
    "terminate called\n  what():  vector::at\n": "vector::at",
    "llama_model_load: error loading model: missing tensor 'x'\nllama_load: failed\n": "missing tensor 'x'",
    "load: error loading model: error loading model hyperparameters: no key\n": "no key",
    "function: out of \x1b[31mmemory\n": "out of ?[31mmemory",
    "": "",
}


@pytest.mark.parametrize("output", REASONS)
def test_the_reason_is_found_in_the_output(output: str) -> None:
    assert trial._reason(output) == REASONS[output]


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (-int(signal.SIGSEGV), ModelFileError, "ended by SIGSEGV"),
        (-1000, ModelFileError, "ended by signal 1000"),
        (7, ModelFileError, "ended with status 7"),
        (-9, OutOfMemoryError, "lack of memory"),
    ],
)
def test_a_silent_end_is_named(tmp_path: Path, status: int, kind: type[Exception], words: str) -> None:
    error = trial._failure(tmp_path / "m.gguf", (), status, "")
    assert type(error) is kind
    assert words in str(error)


def mutate(data: bytes, header_bytes: int, chance: random.Random) -> bytes:
    """A few bytes changed in the header, or many in the weights, or a cut, or a number replaced."""
    changed = bytearray(data)
    kind = chance.randrange(4)
    if kind == 0:
        for _ in range(chance.choice([1, 2, 8])):
            changed[chance.randrange(header_bytes)] = chance.randrange(256)
    elif kind == 1:
        for _ in range(100):
            changed[chance.randrange(header_bytes, len(changed))] = chance.randrange(256)
    elif kind == 2:
        del changed[chance.randrange(len(changed)) :]
    else:
        names = [b"head_count", b"head_count_kv", b"block_count", b"dimension_count", b"feed_forward_length"]
        name = chance.choice(names) + b"\x04\0\0\0"
        start = changed.index(name) + len(name)
        changed[start : start + 4] = chance.choice([0, 1, 3, 8, 64, 2**31]).to_bytes(4, "little")
    return bytes(changed)


@pytest.mark.parametrize("seed", range(25))
def test_no_mutation_ends_this_process(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    path = tmp_path / "m.gguf"
    architecture = chance.choice(["llama", "qwen2"])
    write_tiny_model(path, architecture=architecture, vocabulary_size=260, layers=1)
    path.write_bytes(mutate(path.read_bytes(), read_header(path).data_offset, chance))
    try:
        try_file(path)
    except (ModelFileError, UnsupportedModelError) as error:
        problem = f"{error.message} | {error.hint}"
    else:
        problem = ""
    assert "\n" not in problem


def test_an_adapter_is_tried_with_its_model(tmp_path: Path, children: list[int]) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    adapter = write_lora(tmp_path / "a.gguf", random_lora(path))
    for scale, expected in ((1.0, 2), (1.0, 2), (0.5, 3), (0.0, 3)):
        trial.ensure_loadable(checked_model(path, lora=[LoraConfig(adapter, scale)]))
        assert len(children) == expected
    adapter.write_bytes(adapter.read_bytes() + bytes(32))
    trial.ensure_loadable(checked_model(path, lora=[LoraConfig(adapter)]))
    assert len(children) == 4


def test_an_adapter_without_numbers(tmp_path: Path, children: list[int]) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    lora = random_lora(path)
    broken = {"blk.1.ffn_up.weight.lora_b": np.full((128, 4), np.nan, np.float32)}
    adapter = write_lora(tmp_path / "a.gguf", lora, tensors=broken)
    with pytest.raises(ModelFileError, match=r"a\.gguf: there are NaN .* blk\.1\.ffn_up\.weight\.lora_b"):
        trial.ensure_loadable(checked_model(path, lora=[LoraConfig(adapter)]))
    assert len(children) == 1


def test_what_llama_cpp_makes_of_an_adapter_is_blamed_on_it(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    adapter = write_lora(tmp_path / "a.gguf", random_lora(path))
    with pytest.raises(ModelFileError, match=r"cannot use a\.gguf:1e\+38 with m\.gguf: .* not numbers") as caught:
        trial.ensure_loadable(checked_model(path, lora=[LoraConfig(adapter, 1e38)]))
    assert "scale" in caught.value.hint


def test_a_crash_over_an_adapter_is_an_error_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Past the checks, as something might be that they do not know.
    monkeypatch.setattr(adapters, "_misfit", lambda *_: "")
    path = write_tiny_model(tmp_path / "m.gguf", tensors={"output.weight": None})
    lora = random_lora(path, wanted=lambda name: name == "token_embd.weight")
    adapter = write_lora(tmp_path / "a.gguf", lora)
    with pytest.raises(ModelFileError, match=r"cannot use a\.gguf with m\.gguf: .*GGML_ASSERT"):
        trial.ensure_loadable(checked_model(path, lora=[LoraConfig(adapter)]))


def test_a_model_that_passed_before_there_were_adapters_is_not_tried_again(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    state = path.stat()
    states = [(state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)]
    build = importlib.metadata.version("llama-cpp-python")
    digest = hashlib.sha256(repr((trial.TRIAL_VERSION, build, states)).encode()).hexdigest()
    assert trial._fingerprint([path], []) == digest[:40]
