"""The JSON schemas within a Lark grammar, checked like any other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from abcli.errors import GrammarError

MAX_CHARACTERS = 1 << 16  # of the rules; each schema has a limit of its own
MAX_ALL_CHARACTERS = 1 << 20
_PART = re.compile(
    r'//[^\n]*|"(?:\\.|[^"\\\n])*"|/(?![/*])(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n])+/|(?P<json>%json\b\s*)', re.DOTALL
)


def rewrite_schemas(text: str, rewrite: Callable[[str], str]) -> str:
    """The grammar with what follows each `%json` replaced by `rewrite` of it.

    Raises GrammarError for a text that is too long or not Unicode, for a `%json` without JSON, and what `rewrite` does.
    """
    if len(text) > MAX_ALL_CHARACTERS:
        raise _too_long(len(text), MAX_ALL_CHARACTERS)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GrammarError(f"the Lark grammar has half a character at {error.start:,}", "save it as UTF-8") from None
    parts: list[str] = []
    position, in_schemas = 0, 0
    while (found := _PART.search(text, position)) is not None:
        parts.append(text[position : found.end()])
        position = found.end()
        if found["json"]:
            line = text.count("\n", 0, position) + 1
            try:
                _schema, end = json.JSONDecoder().raw_decode(text, position)
            except (ValueError, RecursionError):
                raise GrammarError(
                    f"what follows %json in line {line} of the Lark grammar is not JSON", "write a JSON schema there"
                ) from None
            parts.append(rewrite(text[position:end]))
            in_schemas += end - position
            position = end
    if len(text) - in_schemas > MAX_CHARACTERS:
        raise _too_long(len(text) - in_schemas, MAX_CHARACTERS)
    return "".join([*parts, text[position:]])


def _too_long(length: int, most: int) -> GrammarError:
    return GrammarError(f"the Lark grammar has {length:,} characters", f"at most {most:,} are allowed")
