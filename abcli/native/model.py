"""A loaded model and its vocabulary."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.errors import ModelFileError, NativeError, PromptError
from abcli.gguf.checked import CheckedModel
from abcli.gguf.lora import Adapter
from abcli.grammar.constraint import Constraint
from abcli.native.gains import HeadGains
from abcli.native.head_bases import HeadBases
from abcli.native.layer_change import LayerChange
from abcli.native.llama import clear_log, initialise, log_tail, raise_interrupt
from abcli.native.owner import Owner

if TYPE_CHECKING:
    from abcli.grammar.guidance import Matcher, Matchers, Vocabulary

# Which numbers of a head RoPE turns together: (2i, 2i + 1), or (i, i + dimensions / 2).
Rotation = Literal["pairs", "halves"]
# LLAMA_TOKEN_ATTR_UNKNOWN | LLAMA_TOKEN_ATTR_CONTROL: what llama_tokenize reads only with parse_special.
_CONTROL_ATTRIBUTES = llama.LLAMA_TOKEN_ATTR_UNKNOWN | llama.LLAMA_TOKEN_ATTR_CONTROL
_NO_TEXT = _CONTROL_ATTRIBUTES | llama.LLAMA_TOKEN_ATTR_UNUSED
# Stands before a text whose tokens are asked for, where the tokenizer would put a space before it.
_SENTINEL = "\x01"
_DEFAULT_BASE = 10000.0
_ROTATIONS: dict[int, Rotation] = {llama.LLAMA_ROPE_TYPE_NORM: "pairs", llama.LLAMA_ROPE_TYPE_NEOX: "halves"}
_MAX_TEXT_BYTES = 2**31 - 1
_NOTHING = nullcontext()


class Model(Owner):
    """Owns one `llama_model` with its adapters and tuning: weights, vocabulary and metadata.

    Close it after every context made of it.
    """

    def __init__(self, checked: CheckedModel) -> None:
        """Load a model with its adapters and tuning, with which every context that is made of it computes.

        Raises ModelFileError if llama.cpp refuses a file, UnsupportedModelError where it cannot be tuned.
        """
        path, adapters = checked.path, checked.adapters
        initialise()
        clear_log()
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = checked.config.gpu_layers
        with ExitStack() as stack:
            handle = llama.llama_model_load_from_file(os.fsencode(path), parameters)
            if not handle:
                raise ModelFileError(
                    f"llama.cpp cannot load {path}: {log_tail() or 'no reason given'}",
                    "download the file again, or try another quantisation of the model",
                )
            stack.callback(llama.llama_model_free, handle)
            vocabulary = llama.llama_model_get_vocab(handle)
            if not vocabulary:
                raise ModelFileError(f"{path} has no vocabulary", "use a GGUF file that carries a tokenizer")
            # llama.cpp frees them with the model (llama_model::~llama_model).
            self._adapter_handles = [_load_adapter(handle, path, adapter) for adapter in adapters]
            raise_interrupt()
            self._changes: list[LayerChange] = []
            if gains := checked.tuning.gains:
                self._changes.append(stack.enter_context(HeadGains(gains)))
            if multipliers := checked.tuning.multipliers:
                self._changes.append(stack.enter_context(HeadBases(multipliers)))
            self._stack = stack.pop_all()
        self.checked = checked
        self.path = path
        self.handle = handle
        self.vocabulary = vocabulary
        self.vocabulary_size: int = llama.llama_vocab_n_tokens(vocabulary)
        self.trained_context: int = llama.llama_model_n_ctx_train(handle)
        rope_type: int = llama.llama_model_rope_type(handle)
        self.has_rope = rope_type != llama.LLAMA_ROPE_TYPE_NONE
        self.rotation = _ROTATIONS.get(rope_type)
        self.sliding_window: int = llama.llama_model_n_swa(handle)
        self.is_recurrent = bool(llama.llama_model_is_recurrent(handle) or llama.llama_model_is_hybrid(handle))
        self.closed = False

    def close(self) -> None:
        """Free the weights; a second call does nothing."""
        self.closed = True
        super().close()

    def making(self) -> AbstractContextManager[None]:
        """What a `llama_context` of this model is made in."""
        return _all([change.making() for change in self._changes]) if self._changes else _NOTHING

    def computing(self) -> AbstractContextManager[None]:
        """What its contexts compute in, each on one thread."""
        return _all([change.acting() for change in self._changes]) if self._changes else _NOTHING

    def apply_adapters(self, context: Any) -> None:
        """Let a new `llama_context` of this model compute with its adapters."""
        adapters = self.checked.adapters
        count = len(adapters)
        if count:
            handles = (llama.llama_adapter_lora_p_ctypes * count)(*self._adapter_handles)
            scales = (ctypes.c_float * count)(*(adapter.scale for adapter in adapters))
            if llama.llama_set_adapters_lora(context, handles, count, scales) != 0:
                raise NativeError(f"llama.cpp cannot use {count} LoRA adapters: {log_tail() or 'no reason given'}")

    def metadata(self, key: str) -> str | None:
        """The value of a GGUF key as text (`llama_model_meta_val_str`), None if the file lacks it."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = llama.llama_model_meta_val_str(self.handle, key.encode(), buffer, size)
            if length < 0:
                return None
            if length < size:
                return buffer.value.decode("utf-8", "replace")
            size = length + 1

    @cached_property
    def architecture(self) -> str:
        """The architecture's name in llama.cpp, e.g. "llama"."""
        return self.metadata("general.architecture") or "unknown"

    @cached_property
    def native_base(self) -> float:
        """The RoPE base the model was trained with; llama.cpp's default where the file names none."""
        return float(self.metadata(f"{self.architecture}.rope.freq_base") or _DEFAULT_BASE)

    @cached_property
    def description(self) -> str:
        """Architecture, size and quantisation in a few words (`llama_model_desc`)."""
        buffer = ctypes.create_string_buffer(256)
        llama.llama_model_desc(self.handle, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja source of the model's own chat template, None if it has none."""
        text = llama.llama_model_chat_template(self.handle, None)
        return text.decode("utf-8", "replace") if text else None

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Text -> token of everything that llama.cpp reads as one token only when special text is parsed."""
        attributes = llama.llama_vocab_get_attr
        found: dict[str, int] = {}
        for token in range(self.vocabulary_size):
            if attributes(self.vocabulary, token) & _CONTROL_ATTRIBUTES:
                text = (llama.llama_vocab_get_text(self.vocabulary, token) or b"").decode("utf-8", "replace")
                if text:
                    found.setdefault(text, token)
        return found

    def attributes(self, token: int) -> int:
        """The token's `llama_token_attr` bits."""
        return int(llama.llama_vocab_get_attr(self.vocabulary, token))

    @cached_property
    def bos_text(self) -> str:
        """The text of the beginning-of-sequence token, empty if there is none."""
        return self._special_text(llama.llama_vocab_bos(self.vocabulary))

    @cached_property
    def eos_text(self) -> str:
        """The text of the end-of-sequence token, empty if there is none."""
        return self._special_text(llama.llama_vocab_eos(self.vocabulary))

    @cached_property
    def first_token(self) -> int:
        """The token that begins texts: BOS, or without one EOS, or else 0."""
        found = (llama.llama_vocab_bos(self.vocabulary), llama.llama_vocab_eos(self.vocabulary), 0)
        return next(token for token in found if token >= 0)

    def _special_text(self, token: int) -> str:
        if token < 0:
            return ""
        return (llama.llama_vocab_get_text(self.vocabulary, token) or b"").decode("utf-8", "replace")

    def matcher(self, constraint: Constraint) -> Matcher:
        """Follows an answer under the constraint, which is not a GBNF grammar; each is compiled once for the model.

        Raises GrammarError for one that cannot be used, UnsupportedModelError for a vocabulary that cannot.
        """
        return self._matchers.start(constraint)

    @cached_property
    def _matchers(self) -> Matchers:
        # Few answers have to follow anything, and what it takes is slow to import.
        from abcli.grammar.guidance import Matchers

        return Matchers(self.read_vocabulary(), self.path.name)

    def read_vocabulary(self) -> Vocabulary:
        """All tokens; those that no answer is to contain as text are marked with 0xff."""
        from abcli.grammar.guidance import Vocabulary

        tokens: list[bytes] = []
        ends: list[int] = []
        for token in range(self.vocabulary_size):
            attributes, is_end, text = self.attributes(token), self.is_end(token), self.piece(token, special=True)
            named = attributes & llama.LLAMA_TOKEN_ATTR_USER_DEFINED and text.startswith(b"<") and text.endswith(b">")
            if is_end:
                ends.append(token)
            # A special token without a text still needs a name.
            special = is_end or attributes & _NO_TEXT or named or not text
            tokens.append(b"\xff" + (text or b"<token %d>" % token) if special else text)
        return Vocabulary(tokens, ends, _tokenizer(self))

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer (`llama_vocab_is_eog`)."""
        return bool(llama.llama_vocab_is_eog(self.vocabulary, token))

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text` (`llama_tokenize`).

        `add_special` adds BOS/EOS where the model asks for them; `parse_special` reads control tokens that
        are spelled out in the text as such. Raises PromptError for text that is not Unicode or is too long.
        """
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text is not valid Unicode: {text[error.start]!r} at position {error.start}",
                "save it as UTF-8",
            ) from None
        if len(data) >= _MAX_TEXT_BYTES // 2:
            raise PromptError(f"the text is too long: {len(data):,} bytes", "shorten it")
        capacity = len(data) + 16
        buffer: NDArray[np.int32] = np.empty(capacity, dtype=np.int32)
        pointer = buffer.ctypes.data_as(llama.llama_token_p)
        count = llama.llama_tokenize(self.vocabulary, data, len(data), pointer, capacity, add_special, parse_special)
        if count < 0:
            raise NativeError(f"llama.cpp cannot tokenize a text of {len(data):,} bytes", "shorten the text")
        return [int(token) for token in buffer[:count]]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes a token stands for (`llama_token_to_piece`); none for control tokens unless `special`."""
        # Each call has its own: the thread that decodes asks while others read texts.
        buffer = ctypes.create_string_buffer(64)
        length = llama.llama_token_to_piece(self.vocabulary, token, buffer, len(buffer), 0, special)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = llama.llama_token_to_piece(self.vocabulary, token, buffer, len(buffer), 0, special)
        return buffer.raw[:length]


def _tokenizer(model: Model) -> Callable[[str], list[int]]:
    """The tokens of a piece of a text, none once the model is closed."""

    def plain(text: str) -> list[int]:
        return [] if model.closed else model.tokenize(text, add_special=False, parse_special=False)

    def after_sentinel(text: str) -> list[int]:
        return plain(_SENTINEL + text)[len(sentinel) :]

    sentinel = plain(_SENTINEL)
    return plain if b"".join(model.piece(token) for token in plain("a")) == b"a" else after_sentinel


@contextmanager
def _all(managers: Sequence[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for manager in managers:
            stack.enter_context(manager)
        yield


def _load_adapter(model: Any, path: Path, adapter: Adapter) -> Any:
    """A `llama_adapter_lora` that belongs to `model`."""
    clear_log()
    handle = llama.llama_adapter_lora_init(model, os.fsencode(adapter.path))
    if not handle:
        raise ModelFileError(
            f"llama.cpp cannot use {adapter.path} with {path.name}: {log_tail() or 'no reason given'}",
            "convert the adapter again, for this very model",
        )
    return handle
