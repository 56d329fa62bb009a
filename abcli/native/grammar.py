"""The GBNF grammar an answer has to follow: given as such, or made from a JSON schema."""

from __future__ import annotations

import json
import re
from typing import Any

from llama_cpp.llama_grammar import SchemaConverter

from abcli.errors import GrammarError, UsageError
from abcli.grammar import gbnf
from abcli.sampling import SamplingConfig

MAX_SCHEMA_CHARACTERS = 1 << 18
MAX_SCHEMA_DEPTH = 64
MAX_NAME_CHARACTERS = 256
# llama-cpp-python writes each optional repetition as a parenthesis inside the one before.
MAX_SCHEMA_REPETITIONS = 500
MAX_ALL_SCHEMA_REPETITIONS = 20_000

_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
_NAMED_SCHEMAS = ("properties", "$defs", "definitions")
_ANNOTATIONS = ("title", "description", "default", "examples", "$comment")
_ANY_TYPE = ["object", "array", "string", "number", "boolean", "null"]
# What the converter looks at; a schema with none of these allows everything.
_CONSTRAINTS = (
    *("type", "$ref", "oneOf", "anyOf", "allOf", "const", "enum", "properties", "additionalProperties"),
    *("items", "prefixItems", "pattern", "format"),
)
# The converter's own allow a quote or a newline within a JSON string, and bytes that are no UTF-8.
_CHARACTER = r"[\x20\x21\x23-\x5B\x5D-\x7E\x80-\uD7FF\uE000-\U0010FFFF]"
_STRING_RULES = {
    "dot": _CHARACTER,
    "char": _CHARACTER + r' | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})',
}
# The converter's code leaves these to the caller; everything else it may raise is a bug here, not a bad schema.
_CONVERTER_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
)
_PATTERN_PART = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(?P<times>[^}]*)\}|(?P<stray>[\]}])|.", re.DOTALL)


def grammar_text(config: SamplingConfig) -> str:
    """The checked GBNF text of `config.grammar` or `config.json_schema`; empty if there is neither.

    Raises UsageError if both are given, GrammarError if the one given cannot be used.
    """
    if config.grammar and config.json_schema:
        raise UsageError("both a grammar and a JSON schema are given", "give only one of them")
    if config.json_schema:
        return schema_to_gbnf(config.json_schema)
    if config.grammar:
        gbnf.check(config.grammar)
    return config.grammar


def schema_to_gbnf(text: str) -> str:
    """The GBNF grammar of a JSON schema (`SchemaConverter` of llama-cpp-python, never fetching anything).

    Keywords the converter does not know (`minimum`, `not`, `patternProperties`, ...) are not enforced.
    Raises GrammarError for text that is not JSON and for schemas that cannot be expressed.
    """
    copier = _Copier()
    schema = copier.schema(_parsed(text))
    converter = SchemaConverter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
    converter._format_literal = _literal
    # In place of its resolve_refs, which skips some references, can fetch, and lets names collide.
    converter._refs = _resolved(schema, copier.references)
    try:
        converter.visit(schema, "")
        converter._rules.update((k, v) for k, v in _STRING_RULES.items() if k in converter._rules)
        grammar = str(converter.format_grammar())
    except _CONVERTER_ERRORS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise GrammarError(
            f"the JSON schema cannot be turned into a grammar: {reason}", "simplify this part of the schema"
        ) from None
    try:
        gbnf.check(grammar)
    except GrammarError as error:
        raise GrammarError(
            f"the JSON schema makes a grammar that cannot be used: {error.message}",
            "simplify the schema; in a pattern only plain characters, [...], (...), |, ., *, +, ? and {} work",
        ) from None
    return grammar


def _parsed(text: str) -> Any:
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise GrammarError(
            f"the JSON schema has {len(text):,} characters", f"at most {MAX_SCHEMA_CHARACTERS:,} are allowed"
        )
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise GrammarError(
            f"the JSON schema is not JSON: {error.msg} in line {error.lineno}, column {error.colno}",
            "correct it; a file is given with `json_schema_file`, not as text",
        ) from None
    except (RecursionError, ValueError) as error:
        raise GrammarError(f"the JSON schema cannot be read: {error}", "simplify it") from None
    if not isinstance(schema, dict):
        raise GrammarError("the JSON schema is not an object", 'write one like {"type": "object"}')
    return schema


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


class _Copier:
    """Copies a schema into one that the converter can neither hang on nor misread.

    It would repeat rules without a bound and loop forever on some patterns; it reads `{}` and `true`, which
    allow any value, as an object or not at all.
    """

    def __init__(self) -> None:
        self._repetitions = 0
        self.references: list[dict[str, Any]] = []
        """The copies of all schemas that have a `$ref`."""

    def schema(self, value: Any, depth: int = MAX_SCHEMA_DEPTH) -> Any:
        """A copy of a schema, or of a list of schemas."""
        if isinstance(value, list):
            return [self.schema(item, _deeper(depth)) for item in value]
        if not isinstance(value, dict):
            return value
        copy: dict[str, Any] = {}
        for key, item in value.items():
            if key in _ANNOTATIONS:
                continue
            _check_name(key)
            self._check_limits(key, item)
            if key in ("const", "enum"):
                copy[key] = item
            elif key in _NAMED_SCHEMAS and isinstance(item, dict):
                copy[key] = self._named(item, _deeper(depth))
            else:
                copy[key] = self.schema(item, _deeper(depth))
            if key in ("items", "additionalProperties"):
                copy[key] = _explicit(copy[key])
        _check_bounds(copy)
        if "$ref" in copy:
            _check_reference(copy["$ref"])
            self.references.append(copy)
        return copy

    def _named(self, schemas: dict[str, Any], depth: int) -> dict[str, Any]:
        for name in schemas:
            _check_name(name)
        return {name: _explicit(self.schema(item, _deeper(depth))) for name, item in schemas.items()}

    def _check_limits(self, key: str, value: Any) -> None:
        if key in _COUNTS:
            if not isinstance(value, int) or value < 0:
                raise GrammarError(f"the JSON schema has {key} {value}"[:200], "use a whole number from 0")
            self._spend(value, f"{key} {value}"[:60])
        if key == "pattern" and isinstance(value, str):
            self._check_pattern(value)

    def _check_pattern(self, pattern: str) -> None:
        for match in _PATTERN_PART.finditer(pattern):
            if match["stray"]:
                raise GrammarError(
                    f"the pattern {pattern[:200]!r} of the JSON schema has a stray {match['stray']!r}",
                    f"write \\{match['stray']}",
                )
            for number in (match["times"] or "").split(","):
                if number.strip().isdecimal():
                    digits = number.strip().lstrip("0")[:9]
                    self._spend(int(digits or "0"), f"{match.group()[:40]} in a pattern")

    def _spend(self, count: int, what: str) -> None:
        self._repetitions += count
        if count > MAX_SCHEMA_REPETITIONS or self._repetitions > MAX_ALL_SCHEMA_REPETITIONS:
            raise GrammarError(
                f"the JSON schema asks for too many repetitions: {what}",
                f"use at most {MAX_SCHEMA_REPETITIONS} at once and {MAX_ALL_SCHEMA_REPETITIONS:,} in all, "
                "or leave the limit out",
            )


def _resolved(schema: dict[str, Any], references: list[dict[str, Any]]) -> dict[str, Any]:
    """What each `$ref` means, by a new name that it is replaced with: the last part names the rule."""
    names: dict[str, str] = {}
    targets: dict[str, Any] = {}
    for reference in references:
        pointer: str = reference["$ref"]
        if pointer not in names:
            target: Any = schema
            for part in pointer.split("/")[1:]:
                key = part.replace("~1", "/").replace("~0", "~")
                if not isinstance(target, dict) or key not in target:
                    raise GrammarError(
                        f"the JSON schema refers to {pointer[:200]!r}, which it does not contain",
                        "define it, or correct the reference",
                    )
                target = target[key]
            names[pointer] = f"#/reference-{len(names)}"
            targets[names[pointer]] = target
        reference["$ref"] = names[pointer]
    return targets


def _explicit(schema: Any) -> Any:
    """The schema itself, unless it allows everything: then one that says so in the converter's words."""
    if schema is True or (isinstance(schema, dict) and not any(key in schema for key in _CONSTRAINTS)):
        return {"type": _ANY_TYPE}
    return schema


def _deeper(depth: int) -> int:
    if depth == 0:
        raise GrammarError(f"the JSON schema nests more than {MAX_SCHEMA_DEPTH} deep", "use $defs and $ref")
    return depth - 1


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME_CHARACTERS:
        raise GrammarError(
            f"the JSON schema has a name of {len(name):,} characters: {name[:40]}...",
            f"use names of at most {MAX_NAME_CHARACTERS} characters",
        )


def _check_bounds(schema: dict[str, Any]) -> None:
    for least, most in (("minItems", "maxItems"), ("minLength", "maxLength")):
        if schema.get(most) is not None and schema.get(least, 0) > schema[most]:
            raise GrammarError(f"the JSON schema has {least} {schema[least]} above {most} {schema[most]}", "swap them")


def _check_reference(reference: Any) -> None:
    if not (isinstance(reference, str) and reference.startswith("#/")):
        raise GrammarError(
            f"the JSON schema refers to something outside itself: {str(reference)[:200]!r}",
            'copy it into "$defs" and refer to "#/$defs/NAME"',
        )


def _literal(json_text: str) -> str:
    """A GBNF literal for a JSON value, spelled as a model spells it: characters as such, not as \\uXXXX.

    Replaces the converter's own, which leaves backslashes alone and so breaks out of its quotes.
    """
    plain = json.dumps(json.loads(json_text), ensure_ascii=False)
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'
