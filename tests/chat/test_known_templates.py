"""The templates known by name write what llama.cpp's built-in ones write."""

from __future__ import annotations

import ctypes

import pytest
from llama_cpp import llama_cpp as native

from abcli.chat.known_templates import KNOWN_TEMPLATES
from abcli.chat.messages import Message
from abcli.chat.template import load_template
from abcli.native.model import Model

# Our name -> llama.cpp's.
COUNTERPARTS = {
    "chatml": "chatml",
    "gemma": "gemma",
    "llama2": "llama2-sys-bos",
    "llama3": "llama3",
    "mistral": "mistral-v3",
    "phi3": "phi3",
    "vicuna": "vicuna",
    "zephyr": "zephyr",
}
TALK = [
    Message("user", "  Who are\nyou? "),
    Message("assistant", " A \u00e9 parrot.\n"),
    Message("user", "{{ 'Why' }} <b>?"),
    Message("assistant", "Because."),
    Message("user", ""),
]
CONVERSATIONS = {
    "one": TALK[:1],
    "answered": TALK[:2],
    "long": TALK,
    "system": [Message("system", " Be brief.\n"), *TALK],
    "system only": [Message("system", "Be brief.")],
}


def native_text(name: str, messages: list[Message], add_generation_prompt: bool) -> str:
    """What `llama_chat_apply_template` makes of the messages."""
    chat = (native.llama_chat_message * len(messages))(
        *((message.role.encode(), message.content.encode()) for message in messages)
    )
    buffer = ctypes.create_string_buffer(4096)
    length = native.llama_chat_apply_template(
        name.encode(), chat, len(messages), add_generation_prompt, buffer, len(buffer)
    )
    assert 0 <= length < len(buffer)
    return buffer.raw[:length].decode()


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", COUNTERPARTS)
def test_a_known_template_writes_what_llama_cpp_writes(spm: Model, name: str, conversation: str, opened: bool) -> None:
    messages = CONVERSATIONS[conversation]
    if (name, conversation) == ("gemma", "system only"):
        pytest.skip("llama.cpp leaves the system message out and would have the model answer to nothing")
    expected = native_text(COUNTERPARTS[name], messages, opened)
    if name == "zephyr":
        expected = expected.replace("<|endoftext|>", spm.eos_text)
    assert load_template(spm, name).render(messages, add_generation_prompt=opened) == expected


def test_alpaca_has_its_usual_headings(spm: Model) -> None:
    messages = [Message("system", "S"), Message("user", "U"), Message("assistant", "A"), Message("user", "V")]
    assert load_template(spm, "alpaca").render(messages) == (
        "S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Instruction:\nV\n\n### Response:\n"
    )


def test_every_known_template_is_tested() -> None:
    assert set(KNOWN_TEMPLATES) == {*COUNTERPARTS, "alpaca"}
