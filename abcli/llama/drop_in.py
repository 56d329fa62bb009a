"""A `llama_cpp.Llama` with buckets inside, for programs and libraries that expect that class.

What builds completions from tokens is the base class's own, so that it answers in the same words; what computes and
merges logits is abcli's, and so are chats with tools or schemas. The base's `__init__` is never called.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_chat_format
from numpy.typing import NDArray

from abcli.chat.response_format import response_schema
from abcli.errors import GrammarError, UsageError
from abcli.generate import common_prefix
from abcli.grammar.check import check
from abcli.llama.chats import SLOT, answer
from abcli.llama.keywords import opened
from abcli.llama.stand_ins import BorrowedModel, NoContext, NoContextError
from abcli.llm import LLM
from abcli.sampling import SamplingConfig

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
# The keywords that are attributes, too.
_AS_GIVEN = (
    *("n_batch", "verbose", "spm_infill", "lora_path", "lora_scale", "last_n_tokens_size"),
    *("chat_format", "chat_handler", "draft_model"),
)


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
        self._llm = self._stack.enter_context(opened(model_path, given, others))
        self._imitate(given)

    @property
    def llm(self) -> LLM:
        """The model as abcli has it."""
        return self._llm

    def _imitate(self, given: Mapping[str, Any]) -> None:
        """Set what the base's methods, and those who use it, read of the object; `given` are the keywords."""
        size = self._llm.context_size
        for name in _AS_GIVEN:
            setattr(self, name, given[name])
        self.model_path = str(self._llm.model.path)
        self.model_params = llama_cpp.llama_model_default_params()
        self.model_params.n_gpu_layers = given["n_gpu_layers"]
        self.context_params = llama_cpp.llama_context_default_params()
        self.context_params.n_ctx, self.context_params.n_batch = size, given["n_batch"]
        self.context_params.n_ubatch, self.context_params.embeddings = given["n_ubatch"], given["embedding"]
        self.cache = None
        self._chat_handlers: dict[str, Any] = {}
        self._seed = given["seed"] or llama_cpp.LLAMA_DEFAULT_SEED
        self._logits_all = given["logits_all"] or given["draft_model"] is not None
        self._model = BorrowedModel(self._llm, verbose=given["verbose"])
        self._ctx = NoContext(size)
        self._embedder: Any = None
        self.tokenizer_ = given["tokenizer"] or llama_cpp.LlamaTokenizer(self)
        self.metadata = self._model.metadata()
        self._n_vocab, self._n_ctx = self._llm.vocabulary_size, size
        self._token_nl, self._token_eos = self.token_nl(), self.token_eos()
        self._sampler: Any = None
        self._requires_eval = True
        self.n_tokens = 0
        self.input_ids: NDArray[np.intc] = np.zeros(size, np.intc)
        # As in the base, of which others read them; memory is taken only for rows that are written.
        self.scores: NDArray[np.float32] = np.empty(
            (size if self._logits_all else given["n_batch"], self._n_vocab), np.float32
        )
        self._last: NDArray[np.float32] = np.zeros(self._n_vocab, np.float32)
        self._candidates: NDArray[Any] = np.zeros(self._n_vocab, _CANDIDATE)
        self._is_recurrent = self._is_hybrid = False

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
        keep = min(common_prefix(engine.tokens(SLOT), wanted), before if self._logits_all else len(wanted) - 1)
        kept = engine.truncate(SLOT, keep)
        if self._logits_all:
            if kept < before:
                engine.prefill(SLOT, wanted[kept:before])
            for start in range(before, len(wanted), engine.outputs):
                for row, logits in enumerate(engine.read({SLOT: wanted[start : start + engine.outputs]})[SLOT], start):
                    self.scores[row] = self._last = self._merged(logits)
        elif len(wanted) - kept == 1:
            self._last = self._merged(engine.step({SLOT: wanted[-1]})[SLOT])
        else:
            self._last = self._merged(engine.prefill(SLOT, wanted[kept:]))
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
        except NoContextError as error:
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
        schema = response_schema(settings.pop("response_format", None))
        if tools or schema is not None:
            chosen = {"tools": tools, "tool_choice": tool_choice or "auto"} if tools else {}
            return answer(
                self._llm,
                self._seed,
                messages,
                {**chosen, "json_schema": schema} if schema is not None else chosen,
                settings,
            )
        if settings.pop("logprobs", None):
            settings["logprobs"] = settings.pop("top_logprobs", None) or 0
        settings.pop("top_logprobs", None)
        prompt = self._llm.prompt_tokens(messages)
        completion = self.create_completion(prompt=prompt, **{"temperature": 0.2, "max_tokens": None, **settings})
        return llama_chat_format._convert_completion_to_chat(completion, stream=bool(settings.get("stream")))

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
