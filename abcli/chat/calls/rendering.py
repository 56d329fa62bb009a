"""A template's format from its source alone, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from abcli.chat.calls.find import find_format
from abcli.chat.calls.format import CallFormat
from abcli.chat.calls.probes import Render
from abcli.chat.sandbox import CompiledTemplate

_KEPT = 64
# Room enough for the few short messages of a probe.
_CONTENT_SIZE = 10_000


def render_source(source: str) -> Render:
    """A template as `find_format` wants it, with the variables that abcli gives templates and invented tokens.

    Raises TemplateError if the source is no template.
    """
    template = CompiledTemplate(source)
    now = datetime.now().astimezone()
    usual = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "functions": "",
        "datetime": now.strftime("%b %d %Y"),
        "date_string": now.strftime("%d %b %Y"),
    }

    def render(
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        values = {**usual, "messages": list(messages), "add_generation_prompt": add_generation_prompt, **variables}
        if tools:
            values["tools"] = list(tools)
        return template.render(values, content_size=_CONTENT_SIZE)

    return render


@lru_cache(_KEPT)
def format_of_source(source: str) -> CallFormat:
    """The format of calls and thoughts of a template. Raises TemplateError if the source is no template."""
    return find_format(render_source(source))
