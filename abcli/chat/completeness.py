"""Whether a template wrote the text of every message: what it leaves out, the model cannot answer."""

from __future__ import annotations

import json
from collections.abc import Sequence

from abcli.chat.control_text import Marks
from abcli.chat.messages import Message
from abcli.chat.thoughts import CLOSE


def missing_message(messages: Sequence[Message], written: str, marks: Marks) -> int | None:
    """The index of the first message whose text or calls are not in `written`, None if all are.

    `messages` are broken up by `marks`, so that each has an edge where its text begins. Templates may strip, change
    case and white space, put messages elsewhere, write results of tools as JSON, and cut what they take for a thought
    off an answer.
    """
    for index, message in enumerate(messages):
        if not all(call.name.strip() in written for call in message.tool_calls):
            return index
    bodies = [(index, _body(message, marks)) for index, message in enumerate(messages)]
    bodies = [(index, body) for index, body in bodies if body]
    folded: str | None = None
    position = 0
    out_of_order = None
    for index, body in bodies:
        found = written.find(body, position)
        if found >= 0:
            position = found + len(body)
            continue
        out_of_order = index if out_of_order is None else out_of_order
        if body in written or (messages[index].role == "tool" and _as_json(body) in written):
            continue
        folded = _folded(written) if folded is None else folded
        if _folded(body) not in folded:
            return index
    # One text may begin like another, or be the same.
    return out_of_order if written.count(marks.edge) < len(bodies) else None


def _body(message: Message, marks: Marks) -> str:
    """The text that must be found, from its edge on; empty if any will do."""
    if message.role == "assistant" and CLOSE in marks.remove(message.content):
        return ""
    return message.content.strip()


def _as_json(body: str) -> str:
    return json.dumps(body, ensure_ascii=False)[1:-1]


def _folded(text: str) -> str:
    return "".join(text.casefold().split())
