"""Messages of every kind, for properties that hold for all of them."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from abcli.chat.messages import Message, Role, ToolCall

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner)
)
CALLS = st.builds(
    ToolCall,
    TEXTS.filter(bool),
    st.dictionaries(TEXTS, VALUES).map(lambda value: json.dumps(value, ensure_ascii=False)),
    TEXTS,
)
PLAIN: tuple[Role, ...] = ("system", "user")
MESSAGES = (
    st.builds(Message, st.sampled_from(PLAIN), TEXTS)
    | st.builds(Message, st.just("assistant"), TEXTS, TEXTS, st.lists(CALLS, max_size=3).map(tuple))
    | st.builds(Message, st.just("tool"), TEXTS, tool_call_id=TEXTS, name=TEXTS)
)
