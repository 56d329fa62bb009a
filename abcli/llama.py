"""A `llama_cpp.Llama` with buckets inside, for programs and libraries that expect that class.

What builds completions from tokens is the base class's own, so that it answers in the same words; what computes and
merges logits is abcli's, and so are chats with tools or schemas. The base's `__init__` is never called.
"""

from __future__ import annotations

import ctypes
import random
import secrets
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import _internals, llama_chat_format
from numpy.typing import NDArray

from abcli.config import LoraConfig
from abcli.errors import GrammarError, UsageError
from abcli.generate import common_prefix
from abcli.grammar.check import check
from abcli.llm import LLM, load
from abcli.native.context import CACHE_TYPE_IDS
from abcli.native.model import Model
from abcli.sampling import SamplingConfig
from abcli.serve.chat_shapes import Chunks, logprobs_of, message_of, usage_of
from abcli.serve.chosen import Watcher

_SLOT = 0
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
# The keywords of the base's `__init__` that `load` has no place for, with what they may say. The first kind would
# change what a model says, the others only how it is held.
_IMPOSSIBLE: Mapping[str, tuple[Any, ...]] = {
    "rope_scaling_type": (llama_cpp.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,),
    # 1 is what it says.
    "rope_freq_scale": (0.0, 1.0),
    "yarn_orig_ctx": (0,),
    "yarn_ext_factor": (-1.0,),
    "yarn_attn_factor": (1.0,),
    "yarn_beta_fast": (32.0,),
    "yarn_beta_slow": (1.0,),
    "attention_type": (llama_cpp.LLAMA_ATTENTION_TYPE_UNSPECIFIED,),
    "kv_overrides": (None,),
    "vocab_only": (False,),
}
_IGNORED: Mapping[str, Any] = {
    "split_mode": llama_cpp.LLAMA_SPLIT_MODE_LAYER,
    "main_gpu": 0,
    "tensor_split": None,
    "use_mmap": True,
    "use_mlock": False,
    "n_threads_batch": None,
    "offload_kqv": True,
    "op_offload": None,
    "swa_full": None,
    "no_perf": False,
    "numa": False,
    "lora_base": None,
    "pooling_type": llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED,
}
# What `load` takes beside what has a name of the base's.
_BUCKETS = (
    *("bases", "multipliers", "spread", "merge", "weights", "profile", "prefill", "prefill_base", "engine"),
    *("prompt_cache", "chat_template", "force"),
)
_warned: set[str] = set()


class Llama(llama_cpp.Llama):  # type: ignore[misc]
    """A model with buckets that is used like a `llama_cpp.Llama`: by one thread at a time."""

    def __init__(
        self,
        model_path: str,
        *,
        buckets: int | None = None,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        seed: int = llama_cpp.LLAMA_DEFAULT_SEED,
        chat_format: str | None = None,
        chat_handler: Any = None,
        draft_model: Any = None,
        tokenizer: Any = None,
        logits_all: bool = False,
        embedding: bool = False,
        flash_attn: bool = False,
        lora_path: str | None = None,
        lora_scale: float = 1.0,
        rope_freq_base: float = 0.0,
        last_n_tokens_size: int = 64,
        type_k: int | None = None,
        type_v: int | None = None,
        spm_infill: bool = False,
        verbose: bool = True,
        **others: Any,
    ) -> None:
        """Load a model: a path, or a name as abcli knows them. The keywords are llama_cpp.Llama's and `load`'s.

        `buckets` (and `bases`, `spread`, `merge`, `profile`, ...) are as in `load`: without any, the model's profile
        says which, else they are six; 1 is the model as it is. Keywords without a meaning here are warned of once.
        Raises UsageError for those that would change what the model says and cannot be had, and what `load` raises.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "others")}
        self._keywords = {**given, **others}
        self._stack = ExitStack()
        opening = _for_load(others)
        if rope_freq_base:
            if buckets == 1:
                buckets, opening["bases"] = None, (rope_freq_base,)
            else:
                # LangChain always gives one.
                _warn("abcli.Llama does without `rope_freq_base`: buckets have bases of their own", once=True)
        self._llm: LLM = self._stack.enter_context(
            load(
                model_path,
                buckets=buckets,
                lora=[LoraConfig(lora_path, lora_scale)] if lora_path else (),  # type: ignore[arg-type]
                gpu_layers=n_gpu_layers,
                ctx_size=n_ctx,
                batch_size=n_batch,
                ubatch_size=min(n_batch, n_ubatch),
                threads=n_threads or 0,
                flash_attn="on" if flash_attn else "off",
                cache_type_k=_cache_type("type_k", type_k),
                cache_type_v=_cache_type("type_v", type_v),
                warn=partial(_warn, once=False),
                **opening,
            )
        )
        size = self._llm.context_size
        self.model_path = str(self._llm.model.path)
        self.model_params = llama_cpp.llama_model_default_params()
        self.model_params.n_gpu_layers = n_gpu_layers
        self.context_params = llama_cpp.llama_context_default_params()
        self.context_params.n_ctx, self.context_params.n_batch = size, n_batch
        self.context_params.n_ubatch, self.context_params.embeddings = n_ubatch, embedding
        self.n_batch, self.verbose, self.spm_infill = n_batch, verbose, spm_infill
        self.lora_path, self.lora_scale, self.last_n_tokens_size = lora_path, lora_scale, last_n_tokens_size
        self.chat_format, self.chat_handler, self.draft_model = chat_format, chat_handler, draft_model
        self.cache = None
        self._chat_handlers: dict[str, Any] = {}
        self._seed = seed or llama_cpp.LLAMA_DEFAULT_SEED
        self._logits_all = logits_all or draft_model is not None
        self._model = _BorrowedModel(self._llm, verbose=verbose)
        self._ctx = _NoContext(size)
        self._embedder: Any = None
        self.tokenizer_ = tokenizer or llama_cpp.LlamaTokenizer(self)
        self.metadata = self._model.metadata()
        self._n_vocab, self._n_ctx = self._llm.vocabulary_size, size
        self._token_nl, self._token_eos = self.token_nl(), self.token_eos()
        self._sampler: Any = None
        self._requires_eval = True
        self.n_tokens = 0
        self.input_ids: NDArray[np.intc] = np.zeros(size, np.intc)
        # As in the base, of which others read them; memory is taken only for rows that are written.
        self.scores: NDArray[np.float32] = np.empty((size if self._logits_all else n_batch, self._n_vocab), np.float32)
        self._last: NDArray[np.float32] = np.zeros(self._n_vocab, np.float32)
        self._candidates: NDArray[Any] = np.zeros(self._n_vocab, _CANDIDATE)
        self._is_recurrent = self._is_hybrid = False

    @property
    def llm(self) -> LLM:
        """The model as abcli has it."""
        return self._llm

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        if getattr(self, "_embedder", None) is not None:
            self._embedder.close()
            self._embedder = None
        if hasattr(self, "_stack"):
            self._stack.close()

    def __getstate__(self) -> dict[str, Any]:
        """What makes the same model again, as the base's does."""
        return dict(self._keywords)

    def reset(self) -> None:
        """Begin anew; what the model holds is used again where it fits."""
        self.n_tokens = 0
        self._requires_eval = True

    def eval(self, tokens: Sequence[int]) -> None:
        """Let every bucket read `tokens` after those of `n_tokens`; what is merged is what `sample` chooses from.

        With `logits_all`, `scores` has the merged logits after each of them. Raises ContextFullError.
        """
        tokens, engine, before = list(tokens), self._llm.engine, self.n_tokens
        if not tokens:
            return
        wanted = [*self.input_ids[:before].tolist(), *tokens]
        keep = min(common_prefix(engine.tokens(_SLOT), wanted), before if self._logits_all else len(wanted) - 1)
        kept = engine.truncate(_SLOT, keep)
        if self._logits_all:
            if kept < before:
                engine.prefill(_SLOT, wanted[kept:before])
            for start in range(before, len(wanted), engine.outputs):
                for row, logits in enumerate(
                    engine.read({_SLOT: wanted[start : start + engine.outputs]})[_SLOT], start
                ):
                    self.scores[row] = self._last = self._merged(logits)
        elif len(wanted) - kept == 1:
            self._last = self._merged(engine.step({_SLOT: wanted[-1]})[_SLOT])
        else:
            self._last = self._merged(engine.prefill(_SLOT, wanted[kept:]))
        self.input_ids[before : len(wanted)] = tokens
        self.n_tokens = len(wanted)
        self._requires_eval = False

    def _merged(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._llm.generator.merged(logits).logits.copy()

    def _init_sampler(self, *arguments: Any, grammar: Any = None, **settings: Any) -> Any:
        """The base's chain of samplers. Raises GrammarError for a grammar that llama.cpp would not survive."""
        if grammar is not None:
            check(SamplingConfig(grammar=grammar._grammar))
        return super()._init_sampler(*arguments, grammar=grammar, **settings)

    def sample(self, *arguments: Any, idx: int | None = None, **settings: Any) -> int:
        """Choose a token from the merged logits after the last token, or after that at `idx`."""
        if not self.n_tokens:
            raise UsageError("there is nothing to go on from", "eval some tokens first")
        sampler = self._sampler or self._init_sampler(*arguments, **settings)
        logits = self._last if idx is None or idx == self.n_tokens - 1 else self.scores[idx]
        self._candidates["id"] = np.arange(self._n_vocab, dtype=np.int32)
        self._candidates["logit"] = logits
        array = llama_cpp.llama_token_data_array()
        array.data = self._candidates.ctypes.data_as(llama_cpp.llama_token_data_p)
        array.size, array.selected, array.sorted = self._n_vocab, -1, False
        llama_cpp.llama_sampler_apply(sampler.sampler, ctypes.byref(array))
        chosen = self._candidates[array.selected] if 0 <= array.selected < array.size else None
        if chosen is None or chosen["logit"] == -np.inf:
            raise GrammarError("what the answer has to follow leaves no token", "change the grammar or the processors")
        token = int(chosen["id"])
        llama_cpp.llama_sampler_accept(sampler.sampler, token)
        return token

    def _create_completion(self, *arguments: Any, **settings: Any) -> Iterator[Any]:
        """The base's, with its error for a prompt that is too long."""
        try:
            yield from super()._create_completion(*arguments, **settings)
        except _NoContextError as error:
            raise ValueError(f"the prompt exceeds the context window of {self._n_ctx}") from error

    def create_chat_completion(
        self,
        messages: Any,
        functions: Any = None,
        function_call: Any = None,
        tools: Any = None,
        tool_choice: Any = None,
        **settings: Any,
    ) -> Any:
        """The answer to a conversation, or its chunks with `stream`, as the base has them.

        The model's own chat template is used, unless a `chat_format` or `chat_handler` was chosen; calls of tools come
        in every family's way of writing them, also streamed, and schemas are enforced.
        """
        if self.chat_format is not None or self.chat_handler is not None:
            chosen = {
                "functions": functions,
                "function_call": function_call,
                "tools": tools,
                "tool_choice": tool_choice,
            }
            return super().create_chat_completion(messages, **chosen, **settings)
        if functions is not None:
            tools = [{"type": "function", "function": function} for function in functions]
        if function_call is not None:
            tool_choice = function_call if isinstance(function_call, str) else {"function": dict(function_call)}
        schema = _schema(settings.pop("response_format", None))
        if tools or schema is not None:
            chosen = {"tools": tools, "tool_choice": tool_choice or "auto"} if tools else {}
            return self._answer(messages, {**chosen, "json_schema": schema} if schema is not None else chosen, settings)
        if settings.pop("logprobs", None):
            settings["logprobs"] = settings.pop("top_logprobs", None) or 0
        settings.pop("top_logprobs", None)
        prompt = self._llm.prompt_tokens(messages)
        completion = self.create_completion(prompt=prompt, **{"temperature": 0.2, "max_tokens": None, **settings})
        return llama_chat_format._convert_completion_to_chat(completion, stream=bool(settings.get("stream")))

    def _answer(self, messages: Any, constraint: dict[str, Any], settings: dict[str, Any]) -> Any:
        """An answer with calls of tools, or one that follows a schema."""
        given = {"temperature": 0.2, **{name: value for name, value in settings.items() if value is not None}}
        for name in ("grammar", "logits_processor"):
            if name in given:
                raise UsageError(f"`{name}` is given beside tools or a schema", "give only one of them")
        head = {"id": f"chatcmpl-{secrets.token_hex(16)}", "created": int(time.time())}
        head["model"] = given.pop("model", self.model_path)
        stream, top = given.pop("stream", False), given.pop("top_logprobs", 0)
        watcher = Watcher(top) if given.pop("logprobs", False) else None
        given["max_tokens"] = limit if (limit := given.pop("max_tokens", 0)) > 0 else -1
        given["seed"] = given.get("seed", random.Random(self._seed).randint(0, 2**31))  # noqa: S311 - as the base
        if mode := given.pop("mirostat_mode", 0):
            given["mirostat"] = mode
        given.pop("tfs_z", None)
        if bias := given.pop("logit_bias", None):
            given["logit_bias"] = tuple((int(token), float(value)) for token, value in bias.items())
        options, config = self._llm.split({**constraint, **given, "observer": watcher})
        asked = self._llm.ask(list(messages), options, config, held=self._llm.held(_SLOT))
        pieces = self._pieces if watcher is not None else ()
        if stream:
            return self._chunks(asked, Chunks(partial(_chunk, head), 0, pieces, {}), watcher)
        for piece in self._llm.answer(asked):
            answer = piece.answer
        assert answer is not None  # noqa: S101 - the last piece has it
        choice = {"index": 0, "message": message_of(answer), "finish_reason": answer.finish_reason, "logprobs": None}
        if watcher is not None:
            choice["logprobs"] = logprobs_of(watcher.take(len(answer.tokens)), pieces)
        return {**head, "object": "chat.completion", "choices": [choice], "usage": usage_of([answer])}

    def _chunks(self, asked: Any, chunks: Chunks, watcher: Watcher | None) -> Iterator[Any]:
        yield chunks.first()
        chosen: list[Any] = []
        for piece in self._llm.answer(asked):
            if watcher is not None and piece.running is not None:
                chosen += watcher.take(len(piece.running.tokens))
            yield from chunks.add(piece, chosen)

    @property
    def _pieces(self) -> Sequence[bytes]:
        """The bytes of every token."""
        return [self._llm.piece(token) for token in range(self._n_vocab)]

    def embed(self, input: Any, *arguments: Any, **settings: Any) -> Any:
        """Embeddings, which buckets have no part in: those of a `llama_cpp.Llama` of the same file.

        Raises UsageError unless the model was made with `embedding=True`.
        """
        if not self.context_params.embeddings:
            raise UsageError("the model was not made for embeddings", "give `embedding=True`")
        if self._embedder is None:
            self._embedder = llama_cpp.Llama(
                self.model_path,
                embedding=True,
                n_ctx=self._n_ctx,
                n_batch=self.n_batch,
                n_gpu_layers=self.model_params.n_gpu_layers,
                verbose=False,
            )
        return self._embedder.embed(input, *arguments, **settings)

    def save_state(self) -> Any:
        """The tokens that were read. Their keys and values are not in it: what the model no longer holds of them is
        computed again.
        """
        scores = self.scores[: self.n_tokens].copy() if self._logits_all else self.scores[:0].copy()
        return llama_cpp.LlamaState(self.input_ids.copy(), scores, self.n_tokens, b"", 0, self._seed)

    def load_state(self, state: Any) -> None:
        """Go on from what `save_state` returned."""
        self.scores[: len(state.scores)] = state.scores
        self.input_ids = state.input_ids.copy()
        self.n_tokens, self._seed = state.n_tokens, state.seed
        self._requires_eval = True


class _NoContextError(UsageError):
    """Somebody asks for llama.cpp's context."""


class _NoContext:
    """What stands for the base's context: there are several, or one of many sequences, and none to be handed out."""

    def __init__(self, size: int) -> None:
        self._size = size

    @property
    def ctx(self) -> Any:
        """Raises UsageError: who decodes by himself would get one bucket's logits, and confuse the others."""
        raise _NoContextError(
            "a model with buckets has no single llama.cpp context (`ctx`)",
            "use generate, eval and sample; or a llama_cpp.Llama",
        )

    def n_ctx(self) -> int:
        return self._size

    def pooling_type(self) -> int:
        return int(llama_cpp.LLAMA_POOLING_TYPE_NONE)

    def kv_cache_seq_rm(self, _sequence: int, _start: int, _end: int) -> bool:
        """Nothing is dropped before it is known what comes instead."""
        return True

    def reset_timings(self) -> None: ...

    def print_timings(self) -> None: ...


class _BorrowedModel(_internals.LlamaModel):  # type: ignore[misc]
    """The base's view of a model that an LLM owns."""

    def __init__(self, llm: LLM, *, verbose: bool) -> None:
        self._llm = llm
        self.path_model = str(llm.model.path)
        self.verbose = verbose

    @property
    def _native(self) -> Model:
        """The model. Raises UsageError once it is closed."""
        return self._llm.native

    @property
    def model(self) -> Any:
        return self._native.handle

    @property
    def vocab(self) -> Any:
        return self._native.vocabulary

    def detokenize(self, tokens: Iterable[int], special: bool = False) -> bytes:
        """As the base, for pieces of any length."""
        tokens = list(tokens)
        text = b"".join(self._native.piece(int(token), special=special) for token in tokens)
        return text[1:] if tokens and tokens[0] == self.token_bos() and text[:1] == b" " else text

    def close(self) -> None:
        """It is not ours to free."""


def _for_load(others: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keywords that `load` takes. Raises UsageError for what cannot be had."""
    for name, value in others.items():
        if name in _BUCKETS:
            continue
        if name in _IMPOSSIBLE:
            if value not in _IMPOSSIBLE[name]:
                raise UsageError(f"`{name}={value}` cannot be had with buckets", "leave it out")
        elif name not in _IGNORED or value != _IGNORED[name]:
            _warn(f"abcli.Llama does without `{name}`", once=True)
    return {name: others[name] for name in _BUCKETS if name in others}


def _warn(line: str, *, once: bool) -> None:
    if not once or line not in _warned:
        _warned.add(line)
        warnings.warn(line, stacklevel=4)


def _cache_type(name: str, number: int | None) -> str:
    """A cache type by ggml's number. Raises UsageError."""
    names = {number: kind for kind, number in CACHE_TYPE_IDS.items()}
    if number is not None and number not in names:
        raise UsageError(f"`{name}={number}` is no type of caches", f"choose one of {sorted(names)}")
    return names[number] if number is not None else "f16"


def _schema(response_format: Any) -> Any:
    """The JSON schema that a `response_format` asks for, None for none. Raises UsageError."""
    kind = response_format.get("type", "text") if isinstance(response_format, Mapping) else "text"
    if kind == "json_object":
        return response_format.get("schema") or {"type": "object"}
    if kind == "json_schema":
        return response_format.get("json_schema", {}).get("schema") or {"type": "object"}
    if kind != "text":
        raise UsageError(f"`response_format` of the type {kind!r:.40}", "use json_object or json_schema")
    return None


def _chunk(head: Mapping[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {**head, "object": "chat.completion.chunk", "choices": choices}
