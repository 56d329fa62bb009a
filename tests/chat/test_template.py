"""Templates become tokens in which what was typed stays text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abcli.chat.known_templates import KNOWN_TEMPLATES
from abcli.chat.messages import Message
from abcli.chat.template import ChatTemplate, load_template
from abcli.errors import PromptError, TemplateError
from abcli.native.model import Model
from tests.chat.conftest import FAMILIES
from tests.support.models import open_model
from tests.support.tiny_gguf import write_tiny_model

# Fixtures that only hold a loaded model may be shared by the examples.
SHARED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TURNS = [Message("user", "Hi there"), Message("assistant", "Hello."), Message("user", "And <b>now</b>?")]


def chatml(model: Model) -> ChatTemplate:
    return load_template(model, "chatml")


def controls(model: Model, tokens: list[int]) -> list[int]:
    """The control tokens among `tokens`."""
    return [token for token in tokens if token in set(model.control_tokens.values())]


def text_of(model: Model, tokens: list[int]) -> str:
    """What the tokens say, control tokens left out; SentencePiece's extra spaces removed."""
    return b"".join(model.piece(token) for token in tokens).decode().replace(" ", "")


def said(contents: list[str]) -> str:
    """The text that chatml puts between its control tokens, without spaces."""
    return ("".join(f"user\n{content}\n" for content in contents) + "assistant\n").replace(" ", "")


def users(contents: list[str]) -> list[Message]:
    return [Message("user", content) for content in contents]


def test_the_models_own_template_gives_llama_cpps_tokens(bpe: Model) -> None:
    template = load_template(bpe, None)
    text = template.render(TURNS)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert text.endswith("<|im_start|>user\nAnd <b>now</b>?<|im_end|>\n<|im_start|>assistant\n")
    assert template.tokens(TURNS) == bpe.tokenize(text, add_special=True, parse_special=True)
    assert len(controls(bpe, template.tokens(TURNS))) == 2 * (len(TURNS) + 1) + 1


def test_without_control_text_the_tokens_are_llama_cpps(model: Model) -> None:
    for name in KNOWN_TEMPLATES:
        template = load_template(model, name)
        text = template.render(TURNS)
        expected = model.tokenize(text, add_special=not text.startswith(model.bos_text), parse_special=True)
        assert template.tokens(TURNS) == expected


def test_every_typed_control_token_stays_text(model: Model) -> None:
    template = chatml(model)
    expected = controls(model, template.tokens(users(["one", "two"])))
    for text in model.control_tokens:
        for content in (text, f"a{text}", f"{text}b", text * 3, text[:1] + text + text[1:]):
            tokens = template.tokens(users([content, "two"]))
            assert controls(model, tokens) == expected
            # Where control tokens swallow line breaks, the text cannot be compared.
            if not model.attributes(model.control_tokens["<|im_start|>"]) & (1 << 8):
                assert text_of(model, tokens) == said([content, "two"])


def test_typed_control_text_costs_the_same_tokens_as_plain_text(bpe: Model) -> None:
    tokens = chatml(bpe).tokens(users(["<|im_end|>"]))
    typed = bpe.tokenize("user\n<|im_end|>", add_special=False, parse_special=False)
    start, end = bpe.control_tokens["<|im_start|>"], bpe.control_tokens["<|im_end|>"]
    assert tokens[: len(typed) + 2] == [start, *typed, end]


def test_the_rest_of_a_conversation_is_unchanged_by_typed_control_text(model: Model) -> None:
    template = chatml(model)
    rest = [Message("assistant", "  two\n"), Message("user", "three ")]
    plain = template.tokens([Message("user", "harmless"), *rest])
    typed = template.tokens([Message("user", "<|im_end|>"), *rest])
    length = len(template.tokens(rest)) - len(template.tokens([], add_generation_prompt=False))
    bos = controls(model, template.tokens([], add_generation_prompt=False))
    assert typed[-length + len(bos) :] == plain[-length + len(bos) :]
    assert typed[: len(bos)] == plain[: len(bos)] == bos


def test_a_token_swallows_the_white_space_before_it_as_in_llama_cpp(masking: Model) -> None:
    template = ChatTemplate("{{ messages[0].content }} \n<mask> tea", masking)
    mask = masking.control_tokens["<mask>"]
    tea = masking.tokenize(" tea", add_special=False, parse_special=False)
    for content in ("tea", "<mask>", "<|im_end|>"):
        typed = masking.tokenize(content, add_special=False, parse_special=False)
        assert template.tokens(users([content])) == [*typed, mask, *tea]


def pieces_of(model: Model) -> st.SearchStrategy[str]:
    """Contents made of control tokens, halves of them, markers and ordinary text."""
    whole = [text for text in model.control_tokens if text.isprintable()][:40]
    halves = [half for text in whole for half in (text[: len(text) // 2], text[len(text) // 2 :]) if half]
    ordinary = ["tea", " ", "\n", "<", "[", "|", ">", "\ufdd0", "\ufdd1", "\U0001f600"]
    return st.lists(st.sampled_from([*whole, *halves, *ordinary]), max_size=8).map("".join)


@SHARED
@given(data=st.data())
def test_no_content_makes_or_unmakes_a_control_token(model: Model, data: st.DataObject) -> None:
    contents = data.draw(st.lists(pieces_of(model), min_size=1, max_size=3))
    template = chatml(model)
    tokens = template.tokens(users(contents))
    assert controls(model, tokens) == controls(model, template.tokens(users(["tea"] * len(contents))))
    if not model.attributes(model.control_tokens["<|im_start|>"]) & (1 << 8):
        assert text_of(model, tokens) == said(contents)


@SHARED
@given(contents=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])), min_size=1, max_size=3))
def test_any_text_without_control_text_is_tokenized_by_llama_cpp(bpe: Model, contents: list[str]) -> None:
    template = chatml(bpe)
    messages = users(contents)
    expected = bpe.tokenize(template.render(messages), add_special=False, parse_special=True)
    assert template.tokens(messages) == expected


@pytest.mark.parametrize(
    "source",
    [
        # Removing a blank leaves a control token behind.
        "<s>{{ messages[0].content.replace(' ', '') }}</s>",
        "<s>{{ messages[0].content | replace(' ', '') }}</s>",
        # The template supplies the beginning.
        "<s><|end{{ messages[0].content }}</s>",
        # Lower case makes one.
        "<s>{{ messages[0].content | lower }}</s>",
    ],
)
@pytest.mark.parametrize("content", ["<|im _end|>", "< |im_end|>", "|>", "<|END|>"])
def test_a_template_that_edits_messages_makes_no_control_token(spm: Model, source: str, content: str) -> None:
    tokens = ChatTemplate(source, spm).tokens(users([content]))
    assert [spm.piece(token, special=True) for token in controls(spm, tokens)] == [b"<s>", b"</s>"]


def test_a_template_may_look_for_something_in_the_messages(spm: Model) -> None:
    template = ChatTemplate("<s>{{ messages[0].content.split('</think>')[-1] }}</s>", spm)
    for content, expected in (("a</think>tea", "tea"), ("a</think>tea</s>", "tea</s>")):
        assert text_of(spm, template.tokens([Message("assistant", content)])) == expected


def test_a_typed_control_token_does_not_replace_the_templates_own(spm: Model) -> None:
    source = "<s>{{ messages[0].content }}{% if '</s>' not in messages[0].content %}</s>{% endif %}"
    tokens = ChatTemplate(source, spm).tokens(users(["</s>tea"]))
    assert tokens[-1] == spm.control_tokens["</s>"]
    assert text_of(spm, tokens) == "</s>tea"


def test_bos_is_added_once(spm: Model) -> None:
    bos = spm.control_tokens["<s>"]
    for source in ("{{ messages[0].content }}", "{{ bos_token }}{{ messages[0].content }}"):
        for content in ("tea", "</s>", "<s>tea"):
            assert controls(spm, ChatTemplate(source, spm).tokens(users([content]))) == [bos]


def test_the_longest_control_token_counts(spm: Model) -> None:
    for content in ("tea", "<|end|>>"):
        tokens = ChatTemplate("<s>{{ messages[0].content }}<|end|>>", spm).tokens(users([content]))
        assert controls(spm, tokens) == [spm.control_tokens["<s>"], spm.control_tokens["<|end|>>"]]


def test_a_control_token_of_one_character_stays_text(spm: Model) -> None:
    sign = FAMILIES[-1]
    tokens = ChatTemplate(f"{sign}{{{{ messages[0].content }}}}", spm).tokens(users([f"tea{sign}"]))
    assert controls(spm, tokens) == [spm.control_tokens["<s>"], spm.control_tokens[sign]]


@pytest.mark.parametrize("answer", ["Hello.", "<|im_end|>", "2+2=4\n\nand so on", "\u00e9"])
def test_a_further_turn_continues_the_tokens(bpe: Model, answer: str) -> None:
    template = chatml(bpe)
    before = template.tokens(TURNS[:1])
    after = template.tokens([*TURNS[:1], Message("assistant", answer), TURNS[2]])
    assert after[: len(before)] == before
    continued = bpe.tokenize(answer, add_special=False, parse_special=False)
    assert after[len(before) :][: len(continued) + 1] == [*continued, bpe.control_tokens["<|im_end|>"]]


def test_text_that_is_not_unicode_is_an_error(bpe: Model) -> None:
    with pytest.raises(PromptError):
        chatml(bpe).tokens(users(["a\udc80"]))


def test_a_template_is_chosen_by_name_or_file(spm: Model, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages[0].content }}\u00e9")
    assert load_template(spm, str(file)).render(TURNS[:1]) == "Hi there\u00e9"
    assert load_template(spm, "gemma").render(TURNS).startswith("<start_of_turn>user\nHi there")


def test_a_missing_template_names_the_known_ones(tmp_path: Path) -> None:
    with open_model(write_tiny_model(tmp_path / "bare.gguf", chat_template=None), gpu_layers=0) as model:
        with pytest.raises(TemplateError, match=r"bare\.gguf has no chat template") as raised:
            load_template(model, None)
        assert "`chat_template`" in raised.value.hint
        assert "chatml" in raised.value.hint
        assert load_template(model, "chatml").tokens(TURNS)


@pytest.mark.parametrize("case", ["missing", "binary", "huge", "directory"])
def test_an_unusable_template_file_is_an_error(spm: Model, tmp_path: Path, case: str) -> None:
    path = tmp_path / "template"
    if case == "binary":
        path.write_bytes(b"\xff\x00")
    elif case == "huge":
        path.write_bytes(b"x" * (1024 * 1024 + 1))
    elif case == "directory":
        path.mkdir()
    with pytest.raises(TemplateError, match="template"):
        load_template(spm, str(path))
