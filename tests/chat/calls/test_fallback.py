"""What a model whose template knows no tools is told."""

from __future__ import annotations

import json

from abcli.chat.calls.fallback import tools_text
from abcli.chat.calls.find import find_format
from abcli.chat.calls.format import HERMES
from tests.chat.calls.conftest import TOOLS


def test_all_tools_are_listed_with_how_to_call_them() -> None:
    text = tools_text(TOOLS)
    listed = text.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
    assert [json.loads(line) for line in listed] == [tool.fields for tool in TOOLS]
    assert HERMES.call_begin.partition('"name')[0] in text


def test_a_template_without_tools_gets_it() -> None:
    form = find_format(lambda messages, tools=None, **variables: "".join(item["content"] or "" for item in messages))
    assert form.fallback
    assert form.call_begin == HERMES.call_begin
