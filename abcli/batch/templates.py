"""Prompts made of a template with `{{field}}` places and the fields of a record; there is no expression language."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abcli.errors import PromptError, UsageError

_PLACE = re.compile(r'\{\{(?:\s*"(?P<literal>[^"\n]*)"\s*|(?P<field>[^{}"\n]*))\}\}')
_LITERAL_HINT = """write {{"{{"}} where the prompt shall have {{"""


@dataclass(frozen=True)
class Template:
    """A text with places for fields.

    `{{name}}` stands for the record's field of that name, with spaces around the name or not; `{{"text"}}` stands
    for the text between the quotes, e.g. `{{"{{"}}` for two braces. Everything else stands for itself.
    """

    parts: tuple[str, ...]
    """Plain texts and names of fields in turn, beginning and ending with a text."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The names it uses, each once."""
        return tuple(dict.fromkeys(self.parts[1::2]))

    def fill(self, record: Mapping[str, Any]) -> str:
        """The prompt for a record: texts as they are, null as nothing, all other values as JSON.

        Raises PromptError for a field that the record has not.
        """
        for name in self.fields:
            if name not in record:
                raise PromptError(f"the template asks for {{{{{name}}}}}, which is not there", _known(record))
        filled = list(self.parts)
        filled[1::2] = [_spelled(record[name]) for name in self.parts[1::2]]
        return "".join(filled)


def parse_template(text: str) -> Template:
    """Read a template. Raises UsageError for `{{` without a name and `}}`, and if no field is used."""
    parts = [""]
    position = 0
    while (start := text.find("{{", position)) >= 0:
        parts[-1] += text[position:start]
        place = _PLACE.match(text, start)
        name = place["field"].strip() if place and place["field"] is not None else ""
        if not place or (place["literal"] is None and not name):
            line = text.count("\n", 0, start) + 1
            raise UsageError(f"line {line} of the template has {{{{ without a field's name and }}}}", _LITERAL_HINT)
        if place["literal"] is not None:
            parts[-1] += place["literal"]
        else:
            parts += [name, ""]
        position = place.end()
    parts[-1] += text[position:]
    if len(parts) == 1:
        raise UsageError("the template uses no field: all prompts would be the same", "write {{name}} for a field")
    return Template(tuple(parts))


def check_fields(template: Template, names: tuple[str, ...]) -> None:
    """Raise UsageError if a table with the columns `names` can fill no prompt at all."""
    for name in template.fields:
        if name not in names:
            raise UsageError(
                f"the template asks for {{{{{name}}}}}, which the table does not have", _known(dict.fromkeys(names))
            )


def _known(record: Mapping[str, Any]) -> str:
    names = list(record)
    shown = ", ".join(repr(name)[:60] for name in names[:20]) + (", ..." if len(names) > 20 else "")
    return f"the fields are {shown}" if names else "there are no fields"


def _spelled(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)
