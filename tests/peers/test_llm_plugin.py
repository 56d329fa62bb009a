"""The plugin of simonw's llm, with the real llm: its command line and its Python interface."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from abcli.config import ENV_HOME, aliases_file
from abcli.hub.aliases import set_alias
from tests.support.tiny_gguf import write_tiny_model

llm = pytest.importorskip("llm", reason="llm is missing: pip install abcli[llm]")

from click.testing import CliRunner, Result  # noqa: E402
from llm.parts import AttachmentPart, Message, TextPart, user  # noqa: E402

from abcli import llm_plugin  # noqa: E402
from abcli.llm import LLM  # noqa: E402

pytestmark = pytest.mark.peers
PLAIN: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "buckets": 2, "ctx_size": 1024}


@pytest.fixture(autouse=True)
def own_llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llm's logs and settings in a directory of the test's."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    monkeypatch.setenv("LLM_RAISE_ERRORS", "")


@pytest.fixture(scope="module", autouse=True)
def closed_at_the_end() -> Iterator[None]:
    yield
    llm_plugin._MODELS.close()


@pytest.fixture
def model(real_model: Path) -> Any:
    assert real_model.is_file()
    return llm.get_model("abcli")


def run(*words: str, text: str | None = None) -> Result:
    from llm.cli import cli

    return CliRunner().invoke(cli, list(words), input=text)


def opened_as_plain() -> LLM:
    """The default model, with the settings of `PLAIN`."""
    return llm_plugin._MODELS._open[(None, ("buckets", 2), ("ctx_size", 1024))]


def options(**changes: Any) -> list[str]:
    given = {**PLAIN, **changes}
    return [word for name, value in given.items() for word in ("-o", name, str(value))]


def test_the_command_line_asks_and_continues(real_model: Path) -> None:
    first = run("-m", "abcli", "Say hello", *options(), "-u")
    assert first.exit_code == 0, first.output
    assert "8 output" in first.stderr
    assert first.stdout.strip()
    second = run("-c", "And again", *options(), "-u")
    assert second.exit_code == 0, second.output
    assert "cached_tokens" in second.stderr
    logged = json.loads(run("logs", "-n", "1", "--json").stdout)[0]
    assert logged["model"] == "abcli"
    assert logged["resolved_model"] == real_model.name
    assert len(logged["response_json"]["bases"]) == 2
    assert run("-m", "abcli", "Say hello", *options(), "--no-stream").stdout == first.stdout
    assert run("prompt", "-m", "abcli", *options(), text="Say hello").stdout == first.stdout


def test_models_are_listed_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(tmp_path / "home" / "models")
    folder.mkdir(parents=True)
    monkeypatch.setenv(ENV_HOME, str(tmp_path / "home"))
    path = write_tiny_model(folder / "little.gguf")
    set_alias("mine", str(path))
    assert "abcli: abcli/little (aliases: abcli/mine)" in run("models").stdout
    answered = run("-m", "abcli/mine", "Hello", *options(ctx_size=256))
    assert answered.exit_code == 0, answered.output
    shown = run("models", "--options", "-m", "abcli/little").stdout
    assert all(name in shown for name in (*PLAIN, "top_p", "seed", "spread", "merge", "profile", "gpu_layers"))
    aliases_file().write_text("{")
    assert run("models").exit_code == 0


def test_abclis_own_commands() -> None:
    listed = run("abcli", "models", "known", "--json")
    assert listed.exit_code == 0
    helped = run("abcli", "pull", "--help")
    assert "--revision" in helped.output
    refused = run("abcli", "pull", "no such name")
    assert refused.exit_code != 0
    assert "no such name" in refused.output


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"buckets": 99}, "99 buckets"),
        ({"top_p": 2}, "top_p"),
        ({"thinking": "hard"}, "thinking"),
        ({"merge": "loudest"}, "loudest"),
        ({"ctx_size": 16}, "tokens"),
    ],
)
def test_what_cannot_be_is_said(real_model: Path, changes: dict[str, Any], said: str) -> None:
    assert real_model.is_file()
    result = run("-m", "abcli", "A rather long message to say hello with", *options(**changes))
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_conversation_computes_nothing_twice(model: Any) -> None:
    conversation = model.conversation()
    first = conversation.prompt("Write a word.", **PLAIN)
    assert first.text()
    second = conversation.prompt("Another one.", **PLAIN)
    usage = second.usage()
    assert usage.details["prompt_tokens_details"]["cached_tokens"] >= first.usage().input + first.usage().output - 1
    assert usage.input > first.usage().input + first.usage().output


def test_a_model_stays_open(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.prompt("Hello", **PLAIN).text()
    loads = []
    init = LLM.__init__
    monkeypatch.setattr(LLM, "__init__", lambda *given, **named: (loads.append(1), init(*given, **named))[1])
    for seed in (1, 2):
        model.prompt("Hello", **{**PLAIN, "temperature": 0.7, "seed": seed}).text()
    assert loads == []
    model.prompt("Hello", **{**PLAIN, "buckets": 1}).text()
    assert loads == [1]


def test_others_are_closed_where_memory_is_short(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from abcli.errors import OutOfMemoryError

    model.prompt("Hello", **PLAIN).text()
    init = LLM.__init__

    def scarce(*given: Any, **named: Any) -> None:
        if llm_plugin._MODELS._open:
            raise OutOfMemoryError("too little")
        init(*given, **named)

    monkeypatch.setattr(LLM, "__init__", scarce)
    assert model.prompt("Hello", **{**PLAIN, "buckets": 3}).text()
    assert len(llm_plugin._MODELS._open) == 1


def test_a_schema_is_followed(model: Any) -> None:
    schema = {"type": "object", "properties": {"name": {"enum": ["Rex", "Ada"]}}, "additionalProperties": False}
    found = model.prompt("Invent a dog", schema={**schema, "required": ["name"]}, **{**PLAIN, "max_tokens": 40})
    assert json.loads(found.text())["name"] in ("Rex", "Ada")
    done = run("-m", "abcli", "Is it good?", "--schema", "good bool", *options(max_tokens=40))
    assert set(json.loads(done.stdout)) == {"good"}, done.output


def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


ASK = "Use the tool multiply with 6 and 7."


def test_tools_are_called_and_answered(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch)
    chain = model.chain(ASK, tools=[multiply], options={**PLAIN, "max_tokens": 60})
    responses = list(chain.responses())
    assert len(responses) == 2
    (call,) = responses[0].tool_calls()
    assert (call.name, set(call.arguments)) == ("multiply", {"a", "b"})
    (result,) = responses[1].prompt.tool_results
    assert result.output == str(call.arguments["a"] * call.arguments["b"])
    parts = [part for message in responses[1].prompt.messages for part in message.parts]
    assert [type(part).__name__ for part in parts] == ["TextPart", "ToolCallPart", "ToolResultPart"]
    details = responses[1].usage().details
    assert details["prompt_tokens_details"]["cached_tokens"] > responses[0].usage().input


def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first answer, of which a small model makes anything, be a call."""
    split = LLM.split

    def forcing(self: LLM, settings: dict[str, Any]) -> Any:
        chosen, config = split(self, settings)
        if chosen.tools and next(once, None):
            chosen = replace(chosen, tool_choice="required")
        return chosen, config

    once = iter([True])
    monkeypatch.setattr(LLM, "split", forcing)


def test_tools_from_the_command_line(real_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert real_model.is_file()
    forced(monkeypatch)
    code = "def multiply(a: int, b: int) -> int:\n    'Multiply two numbers.'\n    return a * b\n"
    done = run("-m", "abcli", ASK, "--functions", code, "--td", *options(max_tokens=60))
    assert done.exit_code == 0, done.output
    assert "Tool call: multiply" in done.stderr


def test_thoughts_are_events_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "home" / "models"
    folder.mkdir(parents=True)
    monkeypatch.setenv(ENV_HOME, str(tmp_path / "home"))
    write_tiny_model(folder / "thinker.gguf", chat_template=THINKING)
    thinker = llm.get_model("abcli/thinker")
    settings = {**PLAIN, "ctx_size": 256}
    response = thinker.prompt("Hello", **settings)
    kinds = {event.type for event in response.stream_events()}
    assert kinds == {"reasoning"}
    assert response.text() == ""
    hidden = thinker.prompt("Hello", hide_reasoning=True, **settings)
    assert list(hidden.stream_events()) == []
    assert thinker.prompt("Hello", thinking="off", **settings).text()


THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def test_attachments_are_refused(model: Any) -> None:
    picture = llm.Attachment(type="image/png", content=b"png")
    with pytest.raises(ValueError, match="does not support attachments"):
        model.prompt("What is it?", attachments=[picture])
    with pytest.raises(llm.ModelError, match="read text only"):
        model.prompt(messages=[Message("user", [TextPart("What?"), AttachmentPart(picture)])], **PLAIN).text()


def test_a_history_is_taken_as_it_is(model: Any) -> None:
    system = Message("system", [TextPart("Be brief.")])
    history = [system, user("Hello"), Message("assistant", [TextPart("Hi!")])]
    response = model.prompt("How are you?", messages=history, **PLAIN)
    response.text()
    opened = opened_as_plain()
    wanted = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi!"), ("user", "How are you?")]
    tokens = opened.prompt_tokens([{"role": role, "content": text} for role, text in wanted])
    assert response.usage().input == len(tokens)
    assert list(opened.held(0)[: len(tokens)]) == tokens


def test_async_answers_are_the_same(model: Any) -> None:
    asked = llm.get_async_model("abcli")

    async def together() -> list[str]:
        prompts = ("Say one", "Say two", "Say three")
        return list(await asyncio.gather(*(asked.prompt(prompt, **PLAIN).text() for prompt in prompts)))

    found = asyncio.run(together())
    assert found == [model.prompt(prompt, **PLAIN).text() for prompt in ("Say one", "Say two", "Say three")]

    async def wrong() -> None:
        await asked.prompt("Hello", **{**PLAIN, "top_p": 2}).text()

    with pytest.raises(llm.ModelError, match="top_p"):
        asyncio.run(wrong())


def test_an_async_answer_that_is_given_up_ends(model: Any) -> None:
    asked = llm.get_async_model("abcli")

    async def begin() -> int:
        pieces = 0
        async for _ in asked.prompt("Count to a thousand.", **{**PLAIN, "max_tokens": 900}):
            pieces += 1
            if pieces == 3:
                break
        return pieces

    assert asyncio.run(begin()) == 3
    # It waits for the turn that the other one gives up.
    response = model.prompt("Say one", **PLAIN)
    assert response.text()
    opened = opened_as_plain()
    assert len(opened.held(0)) < 200


def test_llm_asks_for_nothing_that_takes_long() -> None:
    program = (
        "import sys, llm\n"
        "assert llm.get_model('abcli') and llm.get_async_model('abcli')\n"
        "print(*{'llama_cpp', 'huggingface_hub.hf_api', 'typer', 'abcli.llm'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout.strip() == ""
