"""llama.cpp's chain of samplers and its grammar, applied to logits that need not come from a context."""

from __future__ import annotations

import ctypes
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.errors import AbcliError, GrammarError, NativeError
from abcli.grammar.constraint import Constraint, constraint_of
from abcli.native.candidates import enough_candidates, likeliest
from abcli.native.llama import clear_log, log_tail
from abcli.native.model import Model
from abcli.native.owner import Owner
from abcli.sampling import NATIVE_RANDOM_SEED, SamplingConfig, check_sampling, encode_breaker

if TYPE_CHECKING:
    from abcli.grammar.guidance import Matcher

# CPU time of one token in the grammar. llama.cpp follows every reading of an ambiguous text, and their number
# can grow tenfold with each token.
MAX_GRAMMAR_SECONDS = 1.0

# Of a GBNF grammar only so many candidates are asked for what comes next: it takes its time for a whole vocabulary.
_ASKED_CANDIDATES = 64

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class SamplerChain(Owner):
    """Chooses the tokens of one answer, as llama.cpp's common_sampler does with the same settings and logits.

    Owns its native handles: close it, or use it as a context manager, before its model is closed. Not for use
    by two threads at a time.
    """

    def __init__(self, model: Model, config: SamplingConfig, *, context_size: int | None = None) -> None:
        """Make the chain; a penalty over the last -1 tokens sees `context_size`, else the trained context.

        Raises UsageError for settings that make no sense and GrammarError for a grammar that cannot be used.
        """
        size = model.vocabulary_size
        check_sampling(config, size)
        constraint = constraint_of(config)
        self.seed = config.seed if config.seed >= 0 else secrets.randbelow(NATIVE_RANDOM_SEED)
        """The seed in use, also where the settings asked for a random one."""
        whole = context_size or model.trained_context
        penalty_last_n = whole if config.repeat_last_n < 0 else config.repeat_last_n
        dry_last_n = whole if config.dry_penalty_last_n < 0 else config.dry_penalty_last_n
        self._memory = max(penalty_last_n, dry_last_n)

        self._ids = np.arange(size, dtype=np.int32)
        self._candidates = np.zeros(size, _CANDIDATE)
        self._candidates_pointer = self._candidates.ctypes.data_as(llama.llama_token_data_p)
        self._array = llama.llama_token_data_array()
        self._any = constraint is not None or bool(config.logit_bias)
        self._grammar: _Grammar | Matcher | None = None
        with ExitStack() as stack:
            self._chain = _own(stack, _make_chain)
            biases = _biases(model, config)
            self._biased = np.unique([bias.token for bias in biases]).astype(np.int64)
            self._enough = enough_candidates(config, penalty_last_n, len(self._biased), size)
            # What moves logits is a chain within the chain, to be applied alone too.
            self._moving = _append(self._chain, _make_chain)
            for make in _moving_samplers(model, config, penalty_last_n, dry_last_n, biases):
                _append(self._moving, make)
            for make in _choosing_samplers(config, self.seed):
                _append(self._chain, make)
            if constraint is not None:
                self._grammar = _follower(stack, model, constraint)
            self._stack = stack.pop_all()
        self._closed = False

    def close(self) -> None:
        """Free the native samplers; a second call does nothing."""
        self._closed = True
        self._stack.close()

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Select the next token from `logits` (float32 `[vocabulary]`, left untouched) and accept it.

        Raises GrammarError if the grammar, with a logit bias, leaves no token or is too ambiguous to follow,
        NativeError for NaN, +inf or only -inf.
        """
        self._check(logits)
        started = time.thread_time()
        token = self._select(logits)
        # void llama_sampler_accept(struct llama_sampler * smpl, llama_token token)
        llama.llama_sampler_accept(self._chain, token)
        if self._grammar is not None:
            self._grammar.accept(token)
            if time.thread_time() - started > MAX_GRAMMAR_SECONDS:
                raise GrammarError(
                    "the grammar can be followed in too many ways at once",
                    "let alternatives differ in their first characters",
                )
        return token

    def confidence(self, logits: NDArray[np.float32]) -> float:
        """The probability (0 to 1) of the likeliest token in `logits` (float32 `[vocabulary]`), which is left to come.

        Biases, penalties and what the answer has to follow count, temperature and truncation do not. Of a GBNF grammar
        only the likeliest candidates are asked, so that the probability may be larger than is said. Raises as `sample`.
        """
        self._check(logits)
        self._fill(logits)
        llama.llama_sampler_apply(self._moving, ctypes.byref(self._array))
        moved = self._candidates["logit"]
        peak = moved.max()
        if peak == -np.inf:
            return 0.0
        shares = np.exp(moved - peak)
        if isinstance(self._grammar, _Grammar):
            count = min(_ASKED_CANDIDATES, len(shares))
            for token in np.argpartition(shares, -count)[-count:]:
                if not self._grammar.allows(int(token)):
                    shares[token] = 0
        elif self._grammar is not None:
            shares[~self._grammar.mask()] = 0
        total = float(shares.sum())
        return float(shares.max()) / total if total > 0 else 0.0

    @property
    def finished(self) -> bool:
        """Whether a schema, regular expression or Lark grammar is complete, so that nothing can follow."""
        return self._grammar is not None and self._grammar.finished

    @property
    def may_choose_any(self) -> bool:
        """Whether a grammar or a bias may want a token of no probability."""
        return self._any

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        """Let penalties and DRY, but not the grammar, see tokens that were not sampled here."""
        self._check_open()
        # No sampler remembers more than this.
        for token in tokens[max(0, len(tokens) - self._memory) :]:
            if not 0 <= token < len(self._ids):
                raise NativeError(f"token {token} is not in the vocabulary", f"it ends at {len(self._ids) - 1}")
            llama.llama_sampler_accept(self._chain, token)

    def _select(self, logits: NDArray[np.float32]) -> int:
        """common_sampler_sample of common/sampling.cpp: rejection first, the grammar on everything if needed."""
        self._fill_likeliest(logits)
        # void llama_sampler_apply(struct llama_sampler * smpl, llama_token_data_array * cur_p)
        llama.llama_sampler_apply(self._chain, ctypes.byref(self._array))
        if self._grammar is None:
            return self._selected(_no_token)
        token = self._selected(_no_token_in_grammar)
        if self._grammar.allows(token):
            return token
        self._fill(logits)
        if isinstance(self._grammar, _Grammar):
            self._grammar.apply(self._array)
        else:
            self._candidates["logit"][~self._grammar.mask()] = -np.inf
        if self._candidates["logit"].max() == -np.inf:
            raise _no_token_in_grammar()
        llama.llama_sampler_apply(self._chain, ctypes.byref(self._array))
        # A bias of -inf may have forbidden all that the grammar allows: accepting it would end the process.
        return self._selected(_no_token_in_grammar)

    def _fill_likeliest(self, logits: NDArray[np.float32]) -> None:
        """Hand the chain the tokens that it may choose, which are few for most settings."""
        if not self._enough:
            self._fill(logits)
            return
        tokens = likeliest(logits, self._enough)
        if len(self._biased):
            tokens = np.union1d(tokens, self._biased)
        self._fill(logits[tokens], tokens)

    def _fill(self, logits: NDArray[np.float32], tokens: NDArray[np.integer[Any]] | None = None) -> None:
        """Hand the chain `tokens` [n], or all, with their `logits` [n]."""
        size = len(logits)
        self._candidates["id"][:size] = self._ids if tokens is None else tokens
        self._candidates["logit"][:size] = logits
        # Samplers shrink the array and move its pointer.
        self._array.data = self._candidates_pointer
        self._array.size = size
        self._array.selected = -1
        self._array.sorted = False

    def _selected(self, failure: Callable[[], AbcliError]) -> int:
        index = self._array.selected
        if not 0 <= index < self._array.size:
            raise failure()
        chosen = self._array.data[index]
        if not math.isfinite(chosen.logit):
            raise failure()
        return int(chosen.id)

    def _check(self, logits: NDArray[np.float32]) -> None:
        self._check_open()
        if logits.shape != self._ids.shape or logits.dtype != np.float32:
            raise NativeError(
                f"cannot sample from {logits.dtype} logits of shape {logits.shape}",
                f"float32 logits of shape {self._ids.shape} are needed",
            )
        peak = logits.max()  # hands a NaN on
        if not math.isfinite(peak):
            raise NativeError(
                f"cannot sample: the largest logit is {peak}", "the model file may be damaged; download it again"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise NativeError("the sampler is closed", "make a new one")


def _moving_samplers(
    model: Model, config: SamplingConfig, penalty_last_n: int, dry_last_n: int, biases: list[Any]
) -> Iterator[Callable[[], Any]]:
    """What makes each sampler that moves logits, in the order of common_sampler_init, where these come first."""
    if biases:
        array = (llama.llama_logit_bias * len(biases))(*biases)
        yield lambda: llama.llama_sampler_init_logit_bias(model.vocabulary_size, len(biases), array)
    if config.mirostat == 2:
        # As in llama.cpp, mirostat takes the place of all truncation and penalties.
        return
    yield lambda: llama.llama_sampler_init_penalties(
        model.vocabulary_size,
        penalty_last_n,
        config.repeat_penalty,
        config.frequency_penalty,
        config.presence_penalty,
    )
    yield lambda: _make_dry(model, config, dry_last_n)


def _choosing_samplers(config: SamplingConfig, seed: int) -> Iterator[Callable[[], Any]]:
    """What makes each of the samplers that follow: truncation, temperature and the choice."""
    if config.mirostat == 2:
        yield lambda: llama.llama_sampler_init_temp(config.temperature)
        yield lambda: llama.llama_sampler_init_mirostat_v2(seed, config.mirostat_tau, config.mirostat_eta)
        return
    yield lambda: llama.llama_sampler_init_top_n_sigma(config.top_n_sigma)
    yield lambda: llama.llama_sampler_init_top_k(config.top_k)
    yield lambda: llama.llama_sampler_init_typical(config.typical_p, 0)
    yield lambda: llama.llama_sampler_init_top_p(config.top_p, 0)
    yield lambda: llama.llama_sampler_init_min_p(config.min_p, 0)
    yield lambda: llama.llama_sampler_init_xtc(config.xtc_probability, config.xtc_threshold, 0, seed)
    yield lambda: llama.llama_sampler_init_temp_ext(config.temperature, 0.0, 1.0)
    yield lambda: llama.llama_sampler_init_dist(seed)


def _biases(model: Model, config: SamplingConfig) -> list[Any]:
    """The user's biases, then -inf for the tokens the model itself wants never to be sampled."""
    count = ctypes.c_int32()
    # const llama_token * llama_vocab_get_suppress_tokens(const struct llama_vocab * vocab, int32_t * n)
    suppressed = llama.llama_vocab_get_suppress_tokens(model.vocabulary, ctypes.byref(count))
    never = [(suppressed[index], -math.inf) for index in range(count.value)]
    return [llama.llama_logit_bias(token, bias) for token, bias in (*config.logit_bias, *never)]


def _make_dry(model: Model, config: SamplingConfig, last_n: int) -> Any:
    breakers = [encode_breaker(breaker) for breaker in config.dry_breakers]
    return llama.llama_sampler_init_dry(
        model.vocabulary,
        config.dry_multiplier,
        config.dry_base,
        config.dry_allowed_length,
        last_n,
        (ctypes.c_char_p * len(breakers))(*breakers),
        len(breakers),
    )


def _follower(stack: ExitStack, model: Model, constraint: Constraint) -> _Grammar | Matcher:
    if constraint.kind != "grammar":
        return model.matcher(constraint)
    from abcli.grammar import gbnf

    gbnf.check(constraint.text)
    return _Grammar(stack, model, constraint.text)


class _Grammar:
    """A GBNF grammar as llama.cpp follows it; freed with the stack that it is made in."""

    finished = False
    """llama.cpp doesn't tell: only an end token ends such an answer."""

    def __init__(self, stack: ExitStack, model: Model, text: str) -> None:
        self._candidate = llama.llama_token_data()
        self._single = llama.llama_token_data_array()
        clear_log()
        try:
            # struct llama_sampler * llama_sampler_init_grammar(const struct llama_vocab *, const char * grammar_str,
            #                                                   const char * grammar_root)
            self._handle = _own(stack, llama.llama_sampler_init_grammar, model.vocabulary, text.encode(), b"root")
        except NativeError:
            # llama.cpp's own words name no rule, but a number.
            from abcli.grammar.gbnf import reason_to_refuse

            reason = reason_to_refuse(text) or log_tail() or "no reason given"
            raise GrammarError(f"llama.cpp refuses the grammar: {reason}", "simplify the grammar") from None

    def allows(self, token: int) -> bool:
        """Whether the token may come next."""
        self._candidate.id, self._candidate.logit, self._candidate.p = token, 1.0, 0.0
        self._single.data = ctypes.pointer(self._candidate)
        self._single.size, self._single.selected, self._single.sorted = 1, -1, False
        self.apply(self._single)
        return bool(self._candidate.logit != -math.inf)

    def apply(self, candidates: Any) -> None:
        """Set the logits of what may not come next to -inf in a `llama_token_data_array`."""
        llama.llama_sampler_apply(self._handle, ctypes.byref(candidates))

    def accept(self, token: int) -> None:
        """Go on after the token, which is one that may come next: any other ends the process."""
        llama.llama_sampler_accept(self._handle, token)


def _own(stack: ExitStack, make: Callable[..., Any], *arguments: Any) -> Any:
    handle = make(*arguments)
    if not handle:
        raise NativeError("llama.cpp could not make a sampler", "there may be too little memory")
    # void llama_sampler_free(struct llama_sampler * smpl)
    stack.callback(llama.llama_sampler_free, handle)
    return handle


def _make_chain() -> Any:
    return llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())


def _append(chain: Any, make: Callable[[], Any]) -> Any:
    with ExitStack() as stack:
        handle = _own(stack, make)
        # void llama_sampler_chain_add(struct llama_sampler * chain, struct llama_sampler * smpl)
        llama.llama_sampler_chain_add(chain, handle)
        stack.pop_all()  # the chain frees it from now on
    return handle


def _no_token() -> NativeError:
    return NativeError("the sampler settings leave no token to choose from", "loosen penalties or logit biases")


def _no_token_in_grammar() -> GrammarError:
    return GrammarError(
        "the grammar leaves no token to choose from",
        "it may be complete while ending the answer is forbidden, or need text the model has no tokens for",
    )
