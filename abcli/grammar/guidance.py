"""JSON schemas, regular expressions and Lark grammars as llguidance compiles and follows them.

llguidance is imported when one of them is first used. It never raises: everything asked of it is followed by a look at
its state. What it is asked to compile is bounded before (`json_schema`, `patterns`, `lark`) and gets a deep stack.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from abcli.errors import GrammarError, NativeError, UnsupportedModelError
from abcli.grammar import json_schema, lark, patterns
from abcli.grammar.constraint import NAMES, Constraint
from abcli.grammar.disjoint import PREFIX

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Chains of references are followed by recursion: 3,000 of them overflow the usual 8 MiB.
STACK_BYTES = 256 << 20
KEPT = 64
# At most one space or two, or one line's end with its indentation: models that are forced to go on otherwise fill
# their context with blanks.
WHITE_SPACE = r"\x20{1,2}|\x0D?\x0A[\x20\x09]{0,40}"
# Without u: \u0061 would name the property "a" and not be taken for it.
_ESCAPES = 'nrbtf"\\'
# Bytes that have to be a token each, or what a grammar wants next could not be written.
_NEEDED = range(0x20, 0x7F)
_LOCATING_SECONDS = 0.5
_stack_lock = threading.Lock()
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Vocabulary:
    """What llguidance needs to know of a model's tokens.

    `tokens` are their bytes, those of control tokens after a byte 0xff, which no text contains. `tokenize` gives the
    tokens of a text as the model was trained to see it.
    """

    tokens: Sequence[bytes]
    ends: Sequence[int]
    tokenize: Callable[[str], list[int]]

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text -> token of those that no text contains: a grammar names them by their numbers, as `<[5]>`."""
        special = ((data[1:], token) for token, data in enumerate(self.tokens) if data[:1] == b"\xff")
        return {text.decode("utf-8", "replace"): token for text, token in special if text}


@dataclass(frozen=True)
class Compiled:
    """A constraint in llguidance's own form, which it accepts; the remarks say what is not enforced."""

    constraint: Constraint
    grammar: str
    remarks: tuple[str, ...] = ()


@lru_cache(KEPT)
def compile_constraint(constraint: Constraint) -> Compiled:
    """Check a constraint, without any model, and put it into llguidance's form.

    Raises GrammarError for one that is wrong, too large, allows nothing, or cannot be enforced.
    """
    if constraint.kind == "json_schema":
        return _compile_schema(constraint)
    if constraint.kind == "regex":
        try:
            grammar = _regex_grammar(patterns.translate(constraint.text, whole=True))
        except GrammarError as error:
            raise GrammarError(f"the regular expression cannot be used: {error.message}", error.hint) from None
        _refuse(constraint, _problem(grammar)[0])
        return Compiled(constraint, grammar)
    remarks: list[str] = []

    def rewrite(text: str) -> str:
        schema = json_schema.translate(text, lenient=constraint.lenient)
        remarks.extend(schema.remarks)
        return json.dumps(_with_options(schema.alone(schema.root), constraint.lenient), ensure_ascii=False)

    return Compiled(constraint, lark.rewrite_schemas(constraint.text, rewrite), tuple(remarks))


def _compile_schema(constraint: Constraint) -> Compiled:
    schema = json_schema.translate(constraint.text, lenient=constraint.lenient)
    grammar = _schema_grammar(schema.alone(schema.root), constraint.lenient)
    problem, warnings = _problem(grammar)
    if problem:
        raise _located(schema, problem)
    remarks = [f"{_meaning(warning) or 'a part of the schema'} is not enforced" for warning in warnings]
    return Compiled(constraint, grammar, (*schema.remarks, *dict.fromkeys(remarks)))


def _with_options(schema: Any, lenient: bool) -> dict[str, Any]:
    """The schema with all options set in it, the only way to set them in a Lark grammar."""
    options = {
        "whitespace_pattern": WHITE_SPACE,
        "json_allowed_escapes": _ESCAPES,
        "lenient": lenient,
        "coerce_one_of": False,
    }
    whole = {"anyOf": [schema]} if not isinstance(schema, dict) else schema
    return {**whole, "x-guidance": options}


def _schema_grammar(schema: Any, lenient: bool = False) -> str:
    return json.dumps({"grammars": [{"json_schema": _with_options(schema, lenient)}]})


def _regex_grammar(pattern: str) -> str:
    guidance = _llguidance()
    return str(guidance.LLMatcher.grammar_from_regex(pattern))


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise GrammarError(
            f"llguidance, which structured answers need, cannot be loaded: {error}",
            "install it with pip; there are no wheels for musl and for glibc before 2.31",
        ) from None
    return llguidance


@lru_cache(1)
def _limits() -> LLParserLimits:
    # Objects with thousands of optional properties need long rows; errors must not repeat the grammar.
    limits: LLParserLimits = _llguidance().LLParserLimits(max_items_in_row=20_000, verbose_errors=False)
    return limits


def _problem(grammar: str) -> tuple[str, list[str]]:
    """Why llguidance refuses a grammar, empty if it doesn't, and what it warns of."""
    guidance = _llguidance()

    def check() -> tuple[bool, list[str]]:
        found: tuple[bool, list[str]] = guidance.LLMatcher.validate_grammar_with_warnings(
            grammar, None, limits=_limits()
        )
        return found

    failed, messages = _with_deep_stack(check)
    return (messages[0] or "no reason given", []) if failed else ("", messages)


def _with_deep_stack(work: Callable[[], _Result]) -> _Result:
    with _stack_lock:
        before = threading.stack_size(STACK_BYTES)
        try:
            pool = ThreadPoolExecutor(1)
            future = pool.submit(work)
        except RuntimeError:
            raise GrammarError("there is too little memory to compile the grammar", "close other programs") from None
        finally:
            threading.stack_size(before)
    with pool:
        return future.result()


# llguidance's words, and what they mean for a schema's author.
_MEANINGS = (
    (r"patternProperty regexes|can't determine if patternProperty", "patternProperties that may match the same name"),
    (r"min/maxProperties only supported", "minProperties or maxProperties beside properties that are optional"),
    (r"Unable to determine if regex is empty", "a pattern that is too complex together with a length or another one"),
    (r"lookarounds not supported", "an anchor in the middle of a pattern"),
    (r"Schema intersection stack level|circular references with", "schemas that repeat themselves within allOf"),
    (r"too large|too many|too big|fuel|limit|TooComplex", "more than can be computed"),
)


def _meaning(problem: str) -> str:
    return next((meaning for pattern, meaning in _MEANINGS if re.search(pattern, problem)), "")


def _refuse(constraint: Constraint, problem: str) -> None:
    if problem:
        name = NAMES[constraint.kind].partition(" ")[2]
        raise GrammarError(f"the {name} cannot be used: {_line(problem)}", "correct or simplify it")


def _line(problem: str) -> str:
    """An error of llguidance on one line, without the grammar that it may go on to show."""
    lines = [line.strip() for line in problem.splitlines() if line.strip()]
    stated = [line for line in lines if line.startswith("error:")]
    first = (stated[0].removeprefix("error:") if stated else lines[0] if lines else "no reason given").strip()
    first = first.partition("; following special tokens")[0]
    return first if len(first) <= 200 else f"{first[:200]}..."


def _located(schema: json_schema.Schema, problem: str) -> GrammarError:
    """The error with the place of the smallest part of the schema that fails by itself."""
    until = time.monotonic() + _LOCATING_SECONDS
    place = "$"
    seen: set[int] = set()
    waiting = _parts(schema, schema.root)
    while waiting and time.monotonic() < until:
        member = waiting.pop(0)
        if id(member) in seen:
            continue
        seen.add(id(member))
        found = _problem(_schema_grammar(schema.alone(member)))[0]
        if found and _is_empty(found) == _is_empty(problem):
            problem, place = found, schema.places.get(id(member), place)
            waiting = _parts(schema, member)
    if _is_empty(problem):
        return GrammarError(f"the JSON schema allows nothing at {place}", "loosen what contradicts itself there")
    meaning = _meaning(problem)
    if meaning:
        return GrammarError(
            f"the JSON schema asks for what cannot be enforced: {meaning}, at {place}", "simplify this part of it"
        )
    return GrammarError(f"the JSON schema cannot be used: {_line(problem)}, at {place}", "simplify this part of it")


def _is_empty(problem: str) -> bool:
    return "Unsatisfiable schema" in problem


def _parts(schema: json_schema.Schema, part: Any) -> list[Any]:
    """The schemas that a schema is made of."""
    if not isinstance(part, dict):
        return []
    found = [part[key] for key in ("additionalProperties", "items") if key in part]
    for key in ("properties", "patternProperties"):
        found += part.get(key, {}).values()
    for key in ("allOf", "anyOf", "prefixItems"):
        found += part.get(key, ())
    if "$ref" in part:
        found.append(schema.definitions[part["$ref"].removeprefix(PREFIX)])
    return [member for member in found if isinstance(member, dict)]


class Matchers:
    """The constraints that are followed in the tokens of one model, each compiled once."""

    def __init__(self, vocabulary: Vocabulary, name: str) -> None:
        """`name` is the model's, for messages. Raises UnsupportedModelError for a vocabulary that cannot be used."""
        guidance = _llguidance()
        present = set(vocabulary.tokens)
        missing = next((chr(byte) for byte in _NEEDED if bytes([byte]) not in present), None)
        if missing is not None or not vocabulary.ends:
            what = "that ends an answer" if missing is None else f"for {missing!r}"
            raise UnsupportedModelError(
                f"{name} cannot give structured answers: its vocabulary has no token {what}",
                "use another file of the model",
            )
        try:
            self._tokenizer: LLTokenizer = guidance.LLTokenizer(_Tokens(vocabulary), eos_token=list(vocabulary.ends))
        except (ValueError, TypeError) as error:
            raise UnsupportedModelError(
                f"{name} cannot give structured answers: its vocabulary cannot be used ({str(error)[:200]})",
                "use another file of the model",
            ) from None
        self._size = len(vocabulary.tokens)
        self._templates: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, constraint: Constraint) -> Matcher:
        """A matcher that has seen nothing yet. Raises GrammarError as `compile_constraint`, or if no token fits."""
        with self._lock:
            template = self._templates.get(constraint)
        if template is None:
            # Others need not wait meanwhile.
            template = self._compile(compile_constraint(constraint))
        with self._lock:
            self._templates[constraint] = template
            self._templates.move_to_end(constraint)
            if len(self._templates) > KEPT:
                self._templates.popitem(last=False)
            return Matcher(template.deep_copy(), self._size)

    def _compile(self, compiled: Compiled) -> LLMatcher:
        guidance = _llguidance()

        def compile_with_tokens() -> LLMatcher:
            matcher: LLMatcher = guidance.LLMatcher(self._tokenizer, compiled.grammar, log_level=0, limits=_limits())
            # What allows nothing shows only now.
            matcher.compute_bitmask()
            return matcher

        matcher = _with_deep_stack(compile_with_tokens)
        if matcher.is_error():
            problem = matcher.get_error()
            if matcher.stop_reason() == "NoExtensionBias" or "NoExtensionBias" in problem:
                problem = "it leaves no token to begin with"
            _refuse(compiled.constraint, problem)
        return matcher


class Matcher:
    """Follows one answer, token by token."""

    def __init__(self, native: LLMatcher, vocabulary_size: int) -> None:
        self._native = native
        self._size = vocabulary_size

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing can follow."""
        return bool(self._native.is_stopped()) and not self._native.is_error()

    def allows(self, token: int) -> bool:
        """Whether the token may come next; an end token if the answer may end here."""
        allowed = self._native.validate_tokens([token]) == 1
        self._check()
        return bool(allowed)

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [vocabulary]; never none."""
        bits = np.frombuffer(self._native.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        """Go on after the token, which is one that may come next."""
        if not self._native.consume_token(token):
            self._check()
            raise NativeError(f"llguidance does not take token {token}, which it allowed")
        self._check()

    def _check(self) -> None:
        """In the error state llguidance allows what ends an answer, so that a failed one would look complete."""
        if self._native.is_error():
            raise GrammarError(
                f"the answer cannot be continued as the grammar wants it: {_line(self._native.get_error())}",
                "simplify the schema or grammar",
            )


class _Tokens:
    """A vocabulary as llguidance asks for it. It holds no native handle: a model may be closed before its matchers."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.ends[0]
        self.tokens = list(vocabulary.tokens)
        self._tokenize = vocabulary.tokenize

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that has to come next: the model's own, unless they stand for something else."""
        data, tokens = text.encode(), self._tokenize(text)
        return tokens if b"".join(self.tokens[token] for token in tokens) == data else self._longest(data)

    def _longest(self, data: bytes) -> list[int]:
        found, position = [], 0
        while position < len(data):
            parts = (data[position : position + length] for length in range(self._longest_token, 0, -1))
            part = next((part for part in parts if part in self._by_bytes), None)
            if part is None:
                break
            found.append(self._by_bytes[part])
            position += len(part)
        return found

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        return {data: token for token, data in enumerate(self.tokens)}

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.tokens))
