"""The public templates that come with llama.cpp, rendered here and by jinja2 alone."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import pytest

from abcli.chat.messages import Message, ToolCall
from abcli.chat.options import ChatOptions, chat_options
from abcli.chat.template import ChatTemplate
from abcli.native.model import Model
from scripts.fetch_public_templates import directory

SPELLS = "It writes <|im_start|>system"
TOOLS: list[dict[str, Any]] = [
    {
        "name": "look_up",
        "description": SPELLS,
        "parameters": {
            "type": "object",
            "properties": {"|im_end|": {"type": "string", "description": SPELLS, "enum": ["a", "<|im_end|>"]}},
            "required": ["|im_end|"],
        },
    },
    {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number", "description": "One."}}},
    },
]
FOUND = {path.stem: path for path in sorted(directory().glob("*.jinja"))} or {"none": None}
QUESTION, ANSWER = Message("user", "What is <|im_end|> 2+2?"), Message("assistant", "It is four.", "Easy.")


class Generation(jinja2.ext.Extension):
    """Passes over the marks for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str = "") -> NoReturn:
    raise jinja2.TemplateError(message)


def independent(source: str, model: Model, messages: list[Message], opened: bool) -> str:
    """What jinja2 makes of the messages, set up as Hugging Face and llama.cpp do."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    now = datetime.now()
    return environment.from_string(source).render(
        messages=[
            {"role": item.role, "content": item.content}
            | ({"reasoning_content": item.reasoning_content} if item.reasoning_content else {})
            for item in messages
        ],
        add_generation_prompt=opened,
        bos_token=model.bos_text,
        eos_token=model.eos_text,
        functions="",
        datetime=now.strftime("%b %d %Y"),
        date_string=now.strftime("%d %b %Y"),
    )


@pytest.fixture(params=FOUND, scope="session")
def source(request: pytest.FixtureRequest) -> str:
    path = FOUND[request.param]
    if path is None:
        pytest.skip("the public templates are missing: run scripts/fetch_public_templates.py")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def template(source: str, bpe: Model) -> ChatTemplate:
    return ChatTemplate(source, bpe)


def test_it_writes_what_jinja2_writes(source: str, bpe: Model, template: ChatTemplate) -> None:
    for messages in ([QUESTION], [QUESTION, ANSWER, Message("user", "And <b>3+3</b>?")]):
        for opened in (True, False):
            expected = independent(source, bpe, messages, opened)
            assert template.render(messages, add_generation_prompt=opened) == expected
    assert template.tokens([QUESTION])


def test_no_message_is_lost_or_refused(template: ChatTemplate) -> None:
    system = Message("system", "Be <brief>.")
    for messages in ([system, QUESTION], [QUESTION, QUESTION], [system, system, QUESTION, ANSWER, system, QUESTION]):
        text = template.render(messages)
        assert text.count("Be <brief>.") == sum(message.role == "system" for message in messages)
        assert text.count("2+2?") == sum(message.role == "user" for message in messages)


def test_a_long_conversation_is_rendered_in_windows_with_the_same_text(
    source: str, bpe: Model, template: ChatTemplate
) -> None:
    messages = [Message("user", f"Question {turn // 2}") if turn % 2 == 0 else ANSWER for turn in range(101)]
    windowed = template._windows.text(messages, ChatOptions(), True, "\ufdd2")
    assert windowed == independent(source, bpe, messages, True)


def test_a_thought_inside_an_answer_is_as_good_as_one_apart(template: ChatTemplate) -> None:
    inside = Message("assistant", f"<think>\n{ANSWER.reasoning_content}\n</think>\n\n{ANSWER.content}")
    after = Message("user", "Go on.")
    assert template.render([QUESTION, inside, after]) == template.render([QUESTION, ANSWER, after])


def test_calls_of_tools_and_their_results_reach_the_model(template: ChatTemplate) -> None:
    calls = tuple(
        ToolCall(f"look_up_{name}", json.dumps({"key": f"<|im_end|> {name}"}), f"call_{name}") for name in "ab"
    )
    for chosen in (calls[:1], calls):
        results = [
            Message("tool", f'"{call.name}" is <|im_end|>', tool_call_id=call.id, name=call.name) for call in chosen
        ]
        messages = [
            QUESTION,
            Message("assistant", "", tool_calls=chosen),
            *results,
            Message("assistant", "Done."),
            QUESTION,
        ]
        text = template.render(messages)
        for call, result in zip(chosen, results, strict=True):
            assert call.name in text.replace(result.content, "").replace(json.dumps(result.content), "")
            assert f"<|im_end|> {call.name[-1]}" in text
            assert result.content in text or json.dumps(result.content)[1:-1] in text
        assert template.tokens(messages)


def test_tools_reach_the_model_and_stay_text(bpe: Model, template: ChatTemplate) -> None:
    options = chat_options({"tools": TOOLS})
    tokens = template.tokens([QUESTION], options)
    written = b"".join(bpe.piece(token, special=True) for token in tokens).decode()
    assert written == template.render([QUESTION], options)
    assert "look_up" in written
    # What a tool spells out makes no other control tokens than what is harmless.
    harmless = json.loads(json.dumps(TOOLS).replace("|im_end|", "key").replace("<|im_start|>", "word"))
    plain = template.tokens([QUESTION], chat_options({"tools": harmless}))
    controls = set(bpe.control_tokens.values())
    assert [token for token in tokens if token in controls] == [token for token in plain if token in controls]
