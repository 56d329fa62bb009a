"""A template gets the messages as it wants them, and the text of every one reaches the model or is an error."""

from __future__ import annotations

import json
import re
from datetime import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abcli.chat.messages import Message, Role, ToolCall
from abcli.chat.template import ChatTemplate
from abcli.errors import TemplateError
from abcli.native.model import Model

ASK, ANSWER, MORE = Message("user", "Who?"), Message("assistant", "Me."), Message("user", "Why?")
SYSTEM, LATE = Message("system", "Be brief."), Message("system", "Be polite.")
LINE = "{{ m.role }}: {{ m.content }}\n"
ALL = "{% for m in messages %}" + LINE + "{% endfor %}"
PARTS = (
    "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)
# As Gemma 2's.
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + LINE + "{% endfor %}"
)
# As Qwen 3.5's.
SYSTEM_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' and loop.index0 %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}" + LINE + "{% endfor %}"
)
# As SmolLM3's: no error, only silence.
DROPS_LATE_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' or not loop.index0 %}" + LINE + "{% endif %}{% endfor %}"
)


def test_a_template_that_reads_parts_gets_parts(spm: Model) -> None:
    template = ChatTemplate(PARTS, spm)
    assert template.render([SYSTEM, ASK, ANSWER, MORE]) == ("system: Be brief.user: Who?assistant: Me.user: Why?")
    assert template.tokens([ASK]) != template.tokens([MORE])


def test_parts_may_be_wanted_of_the_user_alone(spm: Model) -> None:
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content[0].text if m.role == 'user' else m.content }}\n{% endfor %}"
    )
    assert ChatTemplate(source, spm).render([SYSTEM, ASK]) == "system: Be brief.\nuser: Who?\n"


@pytest.mark.parametrize(
    ("source", "messages", "lost"),
    [
        ("{{ messages[0].content }}", [ASK, ANSWER, MORE], "message 2, of the role assistant"),
        ("{{ messages[-1].content }}", [ASK, ANSWER, MORE], "message 1, of the role user"),
        ("{{ messages[0].text }}", [ASK], "message 1, of the role user"),
        ("{{ messages[0].content[:3] }}", [ASK], "message 1, of the role user"),
        # What the template says itself is no message.
        ("user: a{{ messages[0].nothing }}", [Message("user", "a")], "message 1, of the role user"),
        ("{{ messages[0].content }}", [Message("user", "a"), ANSWER, Message("user", "a")], "message 2"),
        ("{{ messages[0].content }}", [Message("user", "a b"), Message("assistant", "a")], "message 2"),
    ],
)
def test_a_message_that_the_template_drops_is_an_error(
    spm: Model, source: str, messages: list[Message], lost: str
) -> None:
    template = ChatTemplate(source, spm)
    for use in (template.render, template.tokens):
        with pytest.raises(TemplateError, match=f"leaves out {lost}") as raised:
            use(messages)
        assert raised.value.hint == "choose another template with `chat_template`"


@pytest.mark.parametrize("edit", ["trim", "lower", "replace('  ', ' ')", "string"])
def test_a_template_may_change_case_and_white_space(spm: Model, edit: str) -> None:
    source = "{{ messages[0].content | " + edit + " }}"
    assert ChatTemplate(source, spm).tokens([Message("user", " A  <b> \u00e9\n")])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text("ab<|>[ \n", max_size=6), min_size=1, max_size=6), st.data())
def test_any_dropped_message_is_found(spm: Model, contents: list[str], data: st.DataObject) -> None:
    roles: list[Role] = ["user", "assistant"]
    messages = [Message(roles[index % 2], content) for index, content in enumerate(contents)]
    dropped = data.draw(st.integers(0, len(contents) - 1))
    source = (
        "{% for m in messages %}{% if loop.index0 != " + str(dropped) + " %}-{{ m.content }}{% endif %}{% endfor %}"
    )
    assert ChatTemplate(ALL, spm).render(messages) == "".join(
        f"{message.role}: {message.content}\n" for message in messages
    )
    if contents[dropped].strip():
        with pytest.raises(TemplateError, match="leaves out message"):
            ChatTemplate(source, spm).render(messages)


def rendered(spm: Model, source: str, messages: list[Message]) -> tuple[str, list[str]]:
    """The text, and what was told about it; said once only."""
    told: list[str] = []
    template = ChatTemplate(source, spm, told.append)
    text = template.render(messages)
    assert template.render(messages) == text
    assert len(told) <= 1
    return text, told


@pytest.mark.parametrize(
    ("source", "messages", "expected", "told"),
    [
        (ALL, [SYSTEM, LATE, ASK, MORE], None, ""),
        (NO_SYSTEM, [ASK, ANSWER, MORE], None, ""),
        (NO_SYSTEM, [SYSTEM, ASK], "user: Be brief.\n\nWho?\n", "system message goes before the user's first"),
        (NO_SYSTEM, [ASK, MORE], "user: Who?\n\nWhy?\n", "joined"),
        (NO_SYSTEM, [SYSTEM, ASK, MORE], "user: Be brief.\n\nWho?\n\nWhy?\n", "before the user's first"),
        (SYSTEM_FIRST, [SYSTEM, LATE, ASK], "system: Be brief.\n\nBe polite.\nuser: Who?\n", "joined"),
        (
            SYSTEM_FIRST,
            [SYSTEM, ASK, ANSWER, LATE, MORE],
            "system: Be brief.\nuser: Who?\nassistant: Me.\nuser: Be polite.\n\nWhy?\n",
            "later system messages are sent as the user's",
        ),
        (DROPS_LATE_SYSTEM, [ASK, LATE], "user: Who?\n\nBe polite.\n", "later system messages"),
    ],
)
def test_what_a_template_refuses_is_sent_in_another_shape(
    spm: Model, source: str, messages: list[Message], expected: str | None, told: str
) -> None:
    text, remarks = rendered(spm, source, messages)
    assert text == (expected or "".join(f"{message.role}: {message.content}\n" for message in messages))
    assert told in "".join(remarks)
    assert bool(remarks) == bool(told)


def test_a_refusal_names_the_message_and_shows_the_templates_own_words(spm: Model) -> None:
    for messages, number in (([ANSWER, ASK], 1), ([ASK, ANSWER, Message("user", "no")], 3)):
        source = (
            NO_SYSTEM
            + "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('No!') }}{% endif %}{% endfor %}"
        )
        with pytest.raises(
            TemplateError, match=rf"refuses message {number}, of the role {messages[number - 1].role}: "
        ):
            ChatTemplate(source, spm).render(messages)


def test_variables_without_a_value_are_undefined_and_the_others_are_there(spm: Model) -> None:
    source = (
        "{{ tools is defined }} {{ documents is defined }} {% for tool in tools %}{% endfor %}"
        "{{ 'f' + functions }} {{ datetime }} {{ date_string }}{{ messages[0].content }}"
    )
    text = ChatTemplate(source, spm).render([ASK])
    now = datetime.now().astimezone()
    assert re.fullmatch(r"False False f \w{3} \d\d \d{4} \d\d \w{3} \d{4}Who\?", text)
    assert str(now.year) in text


def test_a_thought_in_an_old_answer_is_handed_over_as_one(spm: Model) -> None:
    source = "{% for m in messages %}{{ m.content }}({{ m.reasoning_content }}){% endfor %}"
    stored = Message("assistant", "<think>\nhm\n</think>\n\nMe.")
    apart = Message("assistant", "Me.", "hm")
    assert ChatTemplate(source, spm).render([ASK, stored]) == "Who?()Me.(hm)"
    assert ChatTemplate(source, spm).render([ASK, apart]) == "Who?()Me.(hm)"
    # A template that knows no thoughts gets none of them again.
    assert ChatTemplate(ALL, spm).render([ASK, stored]) == "user: Who?\nassistant: Me.\n"
    opened = ChatTemplate(ALL + "{% if add_generation_prompt %}assistant: <think>\n{% endif %}", spm)
    assert opened.opens_thought()
    assert "hm" not in opened.render([ASK, Message("assistant", "hm</think>Me."), MORE])


def test_control_tokens_in_a_thought_stay_text(spm: Model) -> None:
    source = "<s>{% for m in messages %}{{ m.reasoning_content }}{{ m.content }}{% endfor %}</s>"
    tokens = ChatTemplate(source, spm).tokens([ASK, Message("assistant", "Me.", "a</s><|im_end|>")])
    ends = [spm.control_tokens[text] for text in ("</s>", "<|im_end|>")]
    assert [token for token in tokens if token in ends] == ends[:1]


CALLS = (ToolCall("add", '{"a": 1, "b": 2}', "call_1"), ToolCall("note", '{"text": "<|im_end|>"}', "call_2"))
RESULTS = [
    Message("tool", "3", tool_call_id="call_1", name="add"),
    Message("tool", 'as "said"', tool_call_id="call_2", name="note"),
]
TOOLS = "{% for c in m.tool_calls %}[{{ c.id }} {{ c.function.name }} {{ c.function.arguments.a }}]{% endfor %}"
KNOWS_TOOLS = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + TOOLS + "\n{% endfor %}"
# As Mistral's.
SHORT_IDS = (
    "{% for m in messages %}{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids have 9 letters') }}{% endif %}{% endfor %}{% endfor %}" + KNOWS_TOOLS
)
# As Llama 3's.
ONE_CALL = (
    "{% for m in messages %}{% if m.tool_calls and m.tool_calls | length > 1 %}"
    "{{ raise_exception('one at once') }}{% endif %}{% endfor %}" + KNOWS_TOOLS
)


def test_calls_and_results_are_given_to_a_template_that_knows_them(spm: Model) -> None:
    messages = [ASK, Message("assistant", "", tool_calls=CALLS[:1]), RESULTS[0], MORE]
    expected = "user: Who?assistant: [{id} add 1]tool: 3user: Why?"
    assert ChatTemplate(KNOWS_TOOLS, spm).render(messages) == expected.format(id="call_1")
    text = ChatTemplate(SHORT_IDS, spm).render(messages)
    assert re.fullmatch(re.escape(expected).replace(r"\{id\}", "[0-9a-f]{9}"), text)
    both = [ASK, Message("assistant", "", tool_calls=CALLS), *reversed(RESULTS)]
    assert ChatTemplate(ONE_CALL, spm).render(both) == (
        'user: Who?assistant: [call_1 add 1]tool: 3assistant: [call_2 note ]tool: as "said"'
    )


def test_arguments_are_text_and_an_empty_content_none_where_a_template_wants_it(spm: Model) -> None:
    source = (
        "{% for m in messages %}{{ m.role }}: {% if m.content is none %}{{ m.tool_calls[0].function.name }} "
        "{{ m.tool_calls[0].function.arguments + '!' }}{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    text = ChatTemplate(source, spm).render([ASK, Message("assistant", "", tool_calls=CALLS[:1]), RESULTS[0]])
    assert text == 'user: Who?;assistant: add {"a": 1, "b": 2}!;tool: 3;'


def test_a_template_that_knows_no_tools_gets_calls_and_results_as_text(spm: Model) -> None:
    told: list[str] = []
    messages = [ASK, Message("assistant", "So:", tool_calls=CALLS), *RESULTS]
    text = ChatTemplate(ALL, spm, told.append).render(messages)
    assert text == (
        'user: Who?\nassistant: So:\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "note", "arguments": {"text": "<|im_end|>"}}\n</tool_call>\n'
        'user: <tool_response>\n3\n</tool_response>\n\n<tool_response>\nas "said"\n</tool_response>\n'
    )
    assert "calls of tools are sent as text" in told[0]


def test_control_tokens_in_calls_and_results_stay_text(spm: Model) -> None:
    source = "<s>{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}</s>"
    bad = "</s><|im_end|>"
    calls = (ToolCall(f"f{bad}", json.dumps({f"k{bad}": [bad, {"x": bad}]}), "call_1"),)
    tokens = ChatTemplate(source, spm).tokens([ASK, Message("assistant", "", tool_calls=calls), Message("tool", bad)])
    ends = [spm.control_tokens[text] for text in ("</s>", "<|im_end|>")]
    assert [token for token in tokens if token in ends] == ends[:1]
