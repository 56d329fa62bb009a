"""The first use of a model file happens in a child process, so that a crash of llama.cpp is an error here.

`abcli.gguf.check` refuses what is known to run into an assertion of llama.cpp. This is for the rest: the
child (`python -m abcli.native.crash_probe [embed] PATH [ADAPTER SCALE]...`) loads the model, tokenises a text and
decodes two tokens, or makes an embedding of them. A file that has passed is remembered, so that it costs the half
second only once.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil

from abcli.config import trial_directory
from abcli.errors import ModelFileError, OutOfMemoryError, UnsupportedModelError
from abcli.gguf.checked import CheckedModel
from abcli.gguf.cursor import FETCH_AGAIN
from abcli.gguf.lora import Adapter
from abcli.gguf.weights import check_finite

# Raised when the child comes to try more, so that files which passed before are tried again.
TRIAL_VERSION = 1
STATUS_REFUSED = 3
STATUS_UNSUPPORTED = 4

# The slowest disk that should still be waited for, and the time for everything that is not reading.
READ_BYTES_PER_SECOND = 20e6
BASE_SECONDS = 120.0
POLL_SECONDS = 0.05
# What llama.cpp takes besides the mapped weights; the text and context are tiny, so little is enough.
SPARE_BYTES = 2 * 2**30
OUTPUT_BYTES = 64 * 1024
REASON_LENGTH = 300
# In place of a path, which is absolute.
_EMBED = "embed"

# Every byte that occurs in valid UTF-8: ASCII, all leading and all continuation bytes.
TRIAL_TEXT = (
    bytes(range(0x80)).decode()
    + "".join(chr(code) for code in range(0x80, 0x800, 63))
    + "".join(chr(code) for code in range(0x800, 0xD800, 4095))
    + "\ue000\uffff\U0001f642\U00040000\U00080000\U000c0000\U00100000 Hello, world"
)


def ensure_loadable(model: CheckedModel, *, embeds: bool = False) -> None:
    """Let a child process load the model unless this very file has passed before; then with its adapters.

    With `embeds` the model is to make embeddings. Raises ModelFileError if llama.cpp refuses a file or crashes,
    UnsupportedModelError if the model cannot write text token by token, OutOfMemoryError if the system ended the child.
    """
    files = tuple(header.path for header in model.files)
    # Alone first, so that it is clear which file is to blame.
    _ensure(model.path, files, (), embeds=embeds)
    if model.adapters:
        _ensure(model.path, files, model.adapters, embeds=embeds)


def _ensure(path: Path, parts: tuple[Path, ...], adapters: tuple[Adapter, ...], *, embeds: bool) -> None:
    files = (*parts, *(adapter.path for adapter in adapters))
    name = _fingerprint(files, [adapter.scale for adapter in adapters]) + (".embeds" if embeds else "")
    memory = trial_directory() / f"{name}.json"
    if memory.is_file():
        return
    for adapter in adapters:
        check_finite([adapter.header])
    size = sum(file.stat().st_size for file in files)
    with tempfile.TemporaryFile() as output:
        status = _run_child(path, adapters, size, output, embeds=embeds)
        output.seek(max(0, output.seek(0, os.SEEK_END) - OUTPUT_BYTES))
        text = output.read().decode("utf-8", errors="replace")
    if status:
        raise _failure(path, adapters, status, text)
    _remember(memory, path)


def _fingerprint(files: Sequence[Path], scales: Sequence[float]) -> str:
    """Names exactly these files, in this state, with this llama.cpp; changes when any of them does."""
    try:
        bindings = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        bindings = "unknown"
    states = [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in (file.stat() for file in files)]
    circumstances = (TRIAL_VERSION, bindings, states, *([tuple(scales)] if scales else []))
    return hashlib.sha256(repr(circumstances).encode()).hexdigest()[:40]


def _remember(memory: Path, path: Path) -> None:
    # A full or read-only disk only means that the file is tried again next time.
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=memory.parent, prefix=".trial-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"path": str(path.absolute()), "passed": int(time.time())}, file)
            Path(temporary).replace(memory)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise


def _run_child(path: Path, adapters: Sequence[Adapter], size: int, output: IO[bytes], *, embeds: bool) -> int:
    """Run the child and return its status as `subprocess` counts it: negative if a signal ended it."""
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONUNBUFFERED": "1"}
    pairs = [(str(adapter.path.absolute()), repr(adapter.scale)) for adapter in adapters]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "abcli.native.crash_probe",
            *([_EMBED] if embeds else []),
            str(path.absolute()),
            *(word for pair in pairs for word in pair),
        ],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        # `-m` searches the working directory first: a stranger's directory must not provide modules.
        cwd=Path(__file__).parents[2],
        env=environment,
        # Ctrl-C reaches this process alone, which then ends the child below.
        start_new_session=True,
    )
    patience = BASE_SECONDS + size / READ_BYTES_PER_SECOND
    deadline = time.monotonic() + patience
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_SECONDS)
            if time.monotonic() > deadline:
                raise ModelFileError(
                    f"llama.cpp cannot load {path}: it did not finish in {patience:.0f} seconds", FETCH_AGAIN
                )
            if _memory_used(process.pid) > size + SPARE_BYTES:
                raise ModelFileError(f"llama.cpp cannot load {path}: it takes more and more memory", FETCH_AGAIN)
    finally:
        process.kill()
        process.wait()


def _memory_used(process_id: int) -> int:
    try:
        return int(psutil.Process(process_id).memory_info().rss)
    except psutil.Error:
        return 0


def _failure(path: Path, adapters: Sequence[Adapter], status: int, output: str) -> Exception:
    """The error for a child that ended with `status` and wrote `output`."""
    if status == STATUS_UNSUPPORTED:
        kind = output.strip().splitlines()[-1]
        return UnsupportedModelError(f"{path} is {kind}", "use a GGUF file of another model")
    if status == -getattr(signal, "SIGKILL", 9):
        return OutOfMemoryError(
            f"the system ended llama.cpp while it loaded {path}, probably for lack of memory",
            "close other programs, or use a smaller model or quantisation",
        )
    reason = _reason(output)
    if not reason:
        reason = f"it was ended by {_signal_name(-status)}" if status < 0 else f"it ended with status {status}"
    if adapters:
        return ModelFileError(
            f"llama.cpp cannot use {', '.join(adapter.label for adapter in adapters)} with {path.name}: {reason}",
            "check that each adapter is made for this very model, and its scale",
        )
    message = f"llama.cpp cannot load {path}: {reason}"
    if "unknown model architecture" in reason or "unknown pre-tokenizer" in reason:
        return UnsupportedModelError(message, "update llama-cpp-python, or use a model that llama.cpp knows")
    return ModelFileError(message, "fetch the file again, or use another conversion of the model")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _reason(output: str) -> str:
    """The line of llama.cpp's output that says why it failed: an assertion, an exception, an error."""
    patterns = (
        r"([^/\\\s]+:\d+: .+)",  # an assertion, as "ggml.c:4014: GGML_ASSERT(...) failed"
        r"what\(\): +(.+)",
        r"error loading model: (?:error loading model \w+: )?(.+)",
        r"(?:\w+: )?(.+)",
    )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern in patterns:
        for line in reversed(lines):
            found = re.search(pattern, line) if pattern != patterns[-1] else re.fullmatch(pattern, line)
            if found:
                # The line may quote the file, which may hold anything, escape sequences included.
                shown = (letter if letter.isprintable() else "?" for letter in found[1].strip())
                return "".join(shown)[:REASON_LENGTH]
    return ""


def main(arguments: list[str]) -> NoReturn:
    """The child: load, tokenise and decode a model; the exit status is the answer. The module says what it is given."""
    _limit_resources()
    embeds = arguments[0] == _EMBED
    path, *given = arguments[embeds:]
    # Only the child pays for this import.
    import llama_cpp.llama_cpp as llama

    def log(level: int, text: bytes, _user_data: Any) -> None:
        if level >= 4:  # GGML_LOG_LEVEL_ERROR
            os.write(2, text)

    callback = llama.llama_log_callback(log)
    llama.llama_log_set(callback, None)
    llama.llama_backend_init()
    adapters = [(Path(path), float(scale)) for path, scale in zip(given[::2], given[1::2], strict=True)]
    status, message = _try_model(llama, Path(path), adapters, embeds=embeds)
    if message:
        os.write(2, message.encode() + b"\n")
    # Without unwinding: nothing is left to save, and freeing large models takes time.
    os._exit(status)


def _limit_resources() -> None:
    # Not on Windows.
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # It writes nothing but its log.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**24, 2**24))


def _try_model(llama: Any, path: Path, adapters: Sequence[tuple[Path, float]], *, embeds: bool) -> tuple[int, str]:
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    # Weights stay as the file has them, mapped: repacking would copy all of them.
    parameters.use_extra_bufts = False
    model = llama.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        return STATUS_REFUSED, ""
    if llama.llama_model_has_encoder(model) or not llama.llama_model_has_decoder(model):
        return STATUS_UNSUPPORTED, "an encoder-decoder model or an encoder"
    if llama.llama_model_is_diffusion(model):
        return STATUS_UNSUPPORTED, "a diffusion model, which does not write token by token"
    loaded = [llama.llama_adapter_lora_init(model, os.fsencode(adapter)) for adapter, _scale in adapters]
    if not all(loaded):
        return STATUS_REFUSED, ""
    options = llama.llama_context_default_params()
    options.n_ctx = 64
    options.n_batch = options.n_ubatch = 8
    options.n_threads = options.n_threads_batch = min(4, os.cpu_count() or 1)
    options.op_offload = options.offload_kqv = False
    options.embeddings = embeds
    if embeds:
        options.pooling_type = llama.LLAMA_POOLING_TYPE_MEAN
    context = llama.llama_init_from_model(model, options)
    if not context:
        return STATUS_REFUSED, ""
    if loaded:
        handles = (llama.llama_adapter_lora_p_ctypes * len(loaded))(*loaded)
        scales = (ctypes.c_float * len(loaded))(*(scale for _adapter, scale in adapters))
        if llama.llama_set_adapters_lora(context, handles, len(loaded), scales):
            return STATUS_REFUSED, ""
    tokens = _tokenise(llama, llama.llama_model_get_vocab(model))
    if len(tokens) < 2:
        return STATUS_REFUSED, "its tokenizer makes no tokens of a text"
    return (_embed if embeds else _decode)(llama, model, context, tokens[:2])


def _tokenise(llama: Any, vocabulary: Any) -> list[int]:
    text = TRIAL_TEXT.encode()
    tokens: list[int] = []
    for special in (False, True):
        buffer = (llama.llama_token * (4 * len(text)))()
        count = llama.llama_tokenize(vocabulary, text, len(text), buffer, len(buffer), special, special)
        tokens = list(buffer[: max(0, count)])
    return tokens


def _decode(llama: Any, model: Any, context: Any, tokens: list[int]) -> tuple[int, str]:
    import numpy as np

    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    for token in tokens:
        # The batch points into this array, which so has to outlive it.
        one = (llama.llama_token * 1)(token)
        status = llama.llama_decode(context, llama.llama_batch_get_one(one, 1))
        if status:
            return STATUS_REFUSED, f"decoding failed with status {status}"
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (size,))
        if np.isnan(logits).any():
            return STATUS_REFUSED, "its weights give results that are not numbers (NaN)"
    return 0, ""


def _embed(llama: Any, model: Any, context: Any, tokens: list[int]) -> tuple[int, str]:
    import numpy as np

    both = (llama.llama_token * 2)(*tokens)
    status = llama.llama_decode(context, llama.llama_batch_get_one(both, 2))
    if status:
        return STATUS_REFUSED, f"computing an embedding failed with status {status}"
    found = llama.llama_get_embeddings_seq(context, 0)
    if not found:
        return STATUS_UNSUPPORTED, "not a model that makes embeddings"
    if np.isnan(np.ctypeslib.as_array(found, (llama.llama_model_n_embd_out(model),))).any():
        return STATUS_REFUSED, "its weights give results that are not numbers (NaN)"
    return 0, ""


if __name__ == "__main__":
    main(sys.argv[1:])
