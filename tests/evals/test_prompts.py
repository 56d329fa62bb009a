"""What a model reads of a question, and which tokens of the answers are scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from abcli.chat.messages import Message, Tool
from abcli.chat.options import ChatOptions
from abcli.chat.template import ChatTemplate, load_template
from abcli.errors import TemplateError
from abcli.evals.prompts import PromptMaker
from abcli.evals.questions import Question
from abcli.native.model import Model
from tests.support.models import open_model
from tests.support.tiny_gguf import write_tiny_model

CONTEXT, TEXT, START = "The sky is green.", "What is the colour of the sky?", "The colour is"


def question(
    answer: str = " green",
    candidates: tuple[str, ...] = (),
    *,
    context: str = CONTEXT,
    text: str = TEXT,
    start: str = START,
) -> Question:
    return Question("q/0", "q", context, text, start, answer, 0.5, 100, candidates)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Iterator[Model]:
    with open_model(tiny_model) as opened:
        yield opened


@pytest.fixture(scope="module")
def template(model: Model) -> ChatTemplate:
    return load_template(model, None)


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("models") / "pieces.gguf"
    with open_model(write_tiny_model(path, tokenizer="llama", chat_template=None)) as opened:
        yield opened


def plain(model: Model, text: str) -> tuple[int, ...]:
    return tuple(model.tokenize(text, add_special=False, parse_special=False))


def text_of(model: Model, tokens: tuple[int, ...]) -> str:
    return b"".join(model.piece(token, special=True) for token in tokens).decode()


def test_a_chat_turn_with_the_beginning_of_the_answer(model: Model, template: ChatTemplate) -> None:
    found = PromptMaker(model, template).tokenize(question())
    turn = template.tokens([Message("user", f"{CONTEXT}\n\n{TEXT}")])
    assert found.prompt == (*turn, *plain(model, START))
    assert text_of(model, found.prompt) == (
        f"<|im_start|>user\n{CONTEXT}\n\n{TEXT}<|im_end|>\n<|im_start|>assistant\n{START}"
    )
    (answer,) = found.continuations
    assert text_of(model, answer) == " green"


def test_plain_text_for_a_model_without_a_template(model: Model, sentence_piece: Model) -> None:
    found = PromptMaker(model, None).tokenize(question())
    assert text_of(model, found.prompt) == f"{CONTEXT}\n\n{TEXT}\n{START}"
    begun = PromptMaker(sentence_piece, None).tokenize(question())
    beginning_of_sequence = 1
    assert begun.prompt.count(beginning_of_sequence) == 1
    assert begun.prompt[0] == beginning_of_sequence
    assert all(beginning_of_sequence not in tokens for tokens in begun.continuations)


def test_nothing_is_put_before_a_question_without_a_context(model: Model) -> None:
    found = PromptMaker(model, None).tokenize(question(context="", start=""))
    assert text_of(model, found.prompt) == f"{TEXT}\n"


def test_control_tokens_that_a_text_spells_out_stay_text(model: Model, template: ChatTemplate) -> None:
    spelt = "<|im_end|>"
    controls = {token for token in range(model.vocabulary_size) if model.piece(token, special=True) == spelt.encode()}
    assert len(controls) == 1
    for maker, own in ((PromptMaker(model, template), 1), (PromptMaker(model, None), 0)):
        found = maker.tokenize(question(spelt, (spelt, "other"), context=spelt, text=spelt, start=spelt))
        assert sum(token in controls for token in found.prompt) == own
        assert not any(token in controls for tokens in found.continuations for token in tokens)
        assert maker.count(spelt) == len(plain(model, spelt)) > 1


def test_the_answer_comes_first_and_only_once(model: Model) -> None:
    found = PromptMaker(model, None).tokenize(question("b", ("a", "b", "c"), start="x"))
    assert [text_of(model, tokens) for tokens in found.continuations] == ["b", "a", "c"]
    assert len(PromptMaker(model, None).tokenize(question("b")).continuations) == 1


def test_an_answer_is_cut_into_tokens_as_in_the_whole_text(model: Model) -> None:
    """`e` and `t` make one token of this model, but `is` ends one, and so no answer begins inside a token."""
    maker = PromptMaker(model, None)
    (joined,) = maker.tokenize(question("t", start="e")).continuations
    assert len(plain(model, "et")) == 1
    # The beginning is read as it stands; what follows is then cut by itself.
    assert joined == plain(model, "t")
    assert plain(model, "eten")[:1] != plain(model, "e")
    (joined,) = maker.tokenize(question("ten", start="e")).continuations
    assert joined == plain(model, "ten")
    for answer in (" ten", "tea", "  x", "\nten"):
        (tokens,) = maker.tokenize(question(answer)).continuations
        assert (*plain(model, START), *tokens) == plain(model, START + answer)


def test_sentence_piece_puts_no_space_of_its_own_into_an_answer(sentence_piece: Model) -> None:
    maker = PromptMaker(sentence_piece, None)
    found = maker.tokenize(question('ten"', start='{"name": "'))
    assert text_of(sentence_piece, (*found.prompt, *found.continuations[0])).endswith('{"name": "ten"')


def test_questions_on_one_context_begin_alike(model: Model, template: ChatTemplate) -> None:
    maker = PromptMaker(model, template)
    one, other = (maker.tokenize(question(text=text)).prompt for text in ("Who?", "When?"))
    shared = len(template.tokens([Message("user", CONTEXT)])) - len(template.tokens([Message("user", "")]))
    assert one[:shared] == other[:shared]
    assert one != other


TOOLS = (Tool("get_weather", "The weather."), Tool("get_time", "The time."))
ASKED = Question(
    "q/0", "q", "not told", "What is the time?", "", "get_time", 0.5, 9, ("get_weather", "get_time"), TOOLS
)


@pytest.mark.parametrize(
    ("further", "closed"),
    [
        ("", ""),
        # A thought that the template opens is ended; where it can be left out, it is.
        ("<think>", "\n</think>\n\n"),
        ("{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}", ""),
    ],
)
def test_a_call_is_asked_for_as_with_a_choice_of_tools(model: Model, further: str, closed: str) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + further + "{% endif %}"
    )
    template = ChatTemplate(source, model)
    maker = PromptMaker(model, template)
    found = maker.tokenize(ASKED)
    options = ChatOptions(TOOLS, "required", thinking="off")
    turn = template.tokens([Message("user", "What is the time?")], options)
    start = f'{closed}<tool_call>\n{{"name": "'
    assert found.prompt == (*turn, *template.written_tokens(start))
    assert "not told" not in text_of(model, found.prompt)
    assert text_of(model, found.prompt).count('"name": "get_weather"') == 1
    # What ends a name is scored, too, and nothing beyond the token that does.
    for name, tokens in zip(("get_time", "get_weather"), found.continuations, strict=True):
        text, shorter = text_of(model, tokens), text_of(model, tokens[:-1])
        assert text.startswith(f'{name}"')
        assert f'{name}", "arguments": '.startswith(text)
        assert name.startswith(shorter)
    assert maker.call_format(TOOLS).fallback


def test_a_call_in_the_templates_own_format(model: Model) -> None:
    source = (
        "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}[{{ m.role }}]"
        "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments|tojson }}"
        "{% endfor %}{{ m.content or '' }}<|im_end|>{% endfor %}"
    )
    found = PromptMaker(model, ChatTemplate(source, model)).tokenize(ASKED)
    assert text_of(model, found.prompt) == "get_weather get_time [user]What is the time?<|im_end|>[TOOL_CALLS]"
    starts = [text_of(model, tokens)[:12] for tokens in found.continuations]
    assert starts == ["get_time[", "get_weather["]


def test_a_model_without_a_template_cannot_be_told_of_tools(model: Model) -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        PromptMaker(model, None).tokenize(ASKED)
