"""Formats that probes cannot find: other notations, and those that templates only speak of."""

from __future__ import annotations

from dataclasses import replace

from abcli.chat.calls.channels import FUNCTIONARY, HARMONY, MUSE
from abcli.chat.calls.format import KEY, NAME, CallFormat, Tags, Thoughts
from abcli.chat.calls.literals import GEMMA_QUOTE

_LISTED = CallFormat(
    "JSON after <|tool_call|>",
    section_begin="<|tool_call|>[",
    call_begin='{"name": "',
    name_end='", "arguments": ',
    call_end="}",
    between=", ",
    section_end="]",
    keys=("name", "arguments"),
)
_PYTHON = CallFormat(
    "Python after <|tool_call_start|>",
    section_begin="<|tool_call_start|>[",
    call_begin="",
    name_end="(",
    call_end=")",
    between=", ",
    section_end="]<|tool_call_end|>",
    notation="python",
)

# By a text that is in the prompt or in the calls of a template with such a format; the first that is counts.
KNOWN_FORMATS: dict[str, CallFormat] = {
    "<|start|>assistant to=functions.": CallFormat(
        "messages to functions (harmony)",
        call_begin=" to=functions.",
        name_end="<|channel|>commentary json<|message|>",
        call_end="",
        between="<|end|><|start|>assistant",
        several=False,
        channels=HARMONY,
        thoughts=Thoughts("<|channel|>analysis<|message|>", "<|end|>"),
        framing=("<|channel|>final<|message|>",),
    ),
    "<atem:function_calls>": CallFormat(
        "messages to functions, with tagged arguments",
        call_begin=f' to={NAME}<|message|><atem:function_calls>\n<atem:invoke name="',
        name_end='">\n',
        call_end="</atem:invoke>\n</atem:function_calls>",
        between="<|eom|><|start|>assistant",
        tags=Tags('<atem:parameter name="', '">', "</atem:parameter>\n"),
        channels=MUSE,
        thoughts=Thoughts(" to=self<|message|>", "<|eom|>"),
        framing=(" to=user<|message|>",),
    ),
    ">>>${recipient}": CallFormat(
        "messages to functions after >>>",
        call_begin="",
        name_end="\n",
        call_end="",
        between=">>>",
        channels=FUNCTIONARY,
        thoughts=None,
        framing=("all\n",),
    ),
    "<|tool_call>call:": CallFormat(
        "Gemma's notation after <|tool_call>",
        call_begin="<|tool_call>call:",
        name_end="{",
        call_end="}<tool_call|>",
        notation="gemma",
        quote=GEMMA_QUOTE,
    ),
    "]<]minimax[>[<tool_call>": CallFormat(
        "tags within tags after ]<]minimax[>[<tool_call>",
        section_begin="]<]minimax[>[<tool_call>\n",
        call_begin=']<]minimax[>[<invoke name="',
        name_end='">',
        call_end="]<]minimax[>[</invoke>\n",
        section_end="]<]minimax[>[</tool_call>",
        tags=Tags("]<]minimax[>[<", ">", f"]<]minimax[>[</{KEY}>"),
    ),
    "<|tool_call_start|>[": _PYTHON,
    "List of tools: [": _PYTHON,
    "List of tools: <|tool_list_start|>[": _PYTHON,
    # Phi-4-mini closes what Granite 3 doesn't.
    "<|/tool_call|>": replace(_LISTED, section_end="]<|/tool_call|>"),
    "<|tool_call|> followed by a JSON list": _LISTED,
}
