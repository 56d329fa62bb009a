"""The drop-in for llama_cpp.Llama, beside the original."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import abcli
from tests.support.tiny_gguf import write_tiny_mamba

PROMPTS = ("The capital of France is", "def add(a, b):", "Ω and naïve 🙂 are", "One, two, three,")
MORE_PROMPTS = ("SELECT name FROM", '{"name": "Ada",', "Roses are red,", "def fibonacci(n):\n    if n < 2:")
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 10}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "seed": 5, "repeat_penalty": 1.3, "top_k": 20, "max_tokens": 10}
DOG = {"type": "object", "properties": {"name": {"enum": ["Rex", "Ada"]}}, "required": ["name"]}
DOG["additionalProperties"] = False
ADD = {
    "name": "add",
    "description": "Add a number",
    "parameters": {
        "type": "object",
        "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["number"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def same(real_model: Path) -> Iterator[tuple[llama_cpp.Llama, llama_cpp.Llama]]:
    settings: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "verbose": False, "logits_all": True}
    original = llama_cpp.Llama(str(real_model), **settings)
    ours = abcli.Llama(str(real_model), buckets=1, **settings)
    yield ours, original
    ours.close()
    original.close()


@pytest.fixture(scope="module")
def several(tiny_model: Path) -> Iterator[abcli.Llama]:
    llama = abcli.Llama(str(tiny_model), buckets=3, n_ctx=2048, verbose=False)
    yield llama
    llama.close()


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, {**SAMPLED, "mirostat_mode": 2}], ids=["0", "0.9", "mirostat"])
def test_one_bucket_says_the_same(same: Any, settings: dict[str, Any]) -> None:
    for prompt in (*PROMPTS, *(MORE_PROMPTS if settings is GREEDY else ())):
        answers = [llama(prompt, stop=["\n\n"], **settings) for llama in same]
        assert answers[0]["choices"] == answers[1]["choices"]
        assert answers[0]["usage"] == answers[1]["usage"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello <b>there</b>"}]
    chats = [llama.create_chat_completion(messages, **settings)["choices"] for llama in same]
    assert chats[0] == chats[1]
    streamed = [
        "".join(piece["choices"][0]["text"] for piece in llama(PROMPTS[0], stream=True, **settings)) for llama in same
    ]
    assert streamed[0] == streamed[1]


def test_it_is_one_of_them_and_has_what_they_have(same: Any) -> None:
    ours, original = same
    assert isinstance(ours, llama_cpp.Llama)
    for name in ("n_ctx", "n_vocab", "n_embd", "token_bos", "token_eos", "token_nl"):
        assert getattr(ours, name)() == getattr(original, name)(), name
    assert ours.metadata == original.metadata
    assert (ours.context_params.n_ctx, ours.n_batch) == (256, 512)
    for text in ("Hello, naïve 🙂 world", " x", "<|im_start|>user"):
        for special in (False, True):
            tokens = ours.tokenize(text.encode(), special=special)
            assert tokens == original.tokenize(text.encode(), special=special)
            assert ours.detokenize(tokens, special=True) == original.detokenize(tokens, special=True)
    assert ours.tokenizer().decode(ours.tokenizer().encode("Hello")) == "Hello"
    assert ours.model is not None


def test_logprobs_processors_grammars_and_biases(same: Any) -> None:
    found = [llama(PROMPTS[0], logprobs=3, echo=True, **GREEDY)["choices"][0] for llama in same]
    assert found[0]["text"] == found[1]["text"]
    assert found[0]["logprobs"]["tokens"] == found[1]["logprobs"]["tokens"]
    for mine, theirs in zip(*(item["logprobs"]["token_logprobs"][1:] for item in found), strict=True):
        assert mine == pytest.approx(theirs, abs=2e-3)
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
    texts = [llama(PROMPTS[0], grammar=grammar, **GREEDY)["choices"][0]["text"] for llama in same]
    assert texts[0] == texts[1]
    assert texts[0] in ("yes", "no")

    def forbid(_tokens: Any, scores: Any) -> Any:
        scores[same[0].tokenize(b" Paris", add_bos=False)[0]] = -np.inf
        return scores

    processors = llama_cpp.LogitsProcessorList([forbid])
    texts = [llama(PROMPTS[0], logits_processor=processors, **GREEDY)["choices"][0]["text"] for llama in same]
    assert texts[0] == texts[1]
    assert "Paris" not in texts[0]
    bias = {same[0].tokenize(b" London", add_bos=False)[0]: 50.0}
    assert same[0](PROMPTS[0], logit_bias=bias, **GREEDY)["choices"][0]["text"].startswith(" London")
    with pytest.raises(abcli.GrammarError):
        same[0](PROMPTS[0], grammar=llama_cpp.LlamaGrammar(_grammar="root ::= nothing"), **GREEDY)


def test_drafts_change_nothing(same: Any, real_model: Path) -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    prompt = "one two three one two three one two"
    drafting = abcli.Llama(
        str(real_model), buckets=1, n_ctx=256, n_threads=1, verbose=False, draft_model=LlamaPromptLookupDecoding()
    )
    try:
        assert drafting(prompt, **GREEDY)["choices"] == same[1](prompt, **GREEDY)["choices"]
    finally:
        drafting.close()


def test_below_the_text(several: abcli.Llama) -> None:
    tokens = several.tokenize(PROMPTS[0].encode())
    several.reset()
    several.eval(tokens)
    merged = abcli.Merger(3, several.n_vocab()).merge(several.llm.logits(tokens), several.llm.buckets.merge)
    assert several.sample(temp=0) == int(merged.logits.argmax())
    generated = several.generate(tokens, temp=0)
    first = [next(generated) for _ in range(4)]
    assert (
        several.detokenize(first).decode(errors="ignore")
        == several(PROMPTS[0], **{**GREEDY, "max_tokens": 4})["choices"][0]["text"]
    )
    state = several.save_state()
    several("Something else", **GREEDY)
    several.load_state(state)
    assert several.n_tokens == state.n_tokens
    again = several.generate(tokens, temp=0)
    assert [next(again) for _ in range(4)] == first
    several.reset()
    assert several.n_tokens == 0


def test_a_cache_is_used(several: abcli.Llama) -> None:
    several.set_cache(llama_cpp.LlamaRAMCache())
    try:
        texts = [several(PROMPTS[0], **GREEDY)["choices"][0]["text"] for _ in range(2)]
    finally:
        several.set_cache(None)
    assert texts[0] == texts[1]


@pytest.mark.filterwarnings("ignore:the chat template")
def test_schemas_and_tools(several: abcli.Llama) -> None:
    messages = [{"role": "user", "content": "Add three"}]
    limits: dict[str, Any] = {"temperature": 0, "max_tokens": 300, "thinking_budget": 0}
    for form in ({"type": "json_object", "schema": DOG}, {"type": "json_schema", "json_schema": {"schema": DOG}}):
        done = several.create_chat_completion(messages, response_format=form, logprobs=True, top_logprobs=2, **limits)
        assert '"name"' in done["choices"][0]["message"]["content"]
        assert len(done["choices"][0]["logprobs"]["content"]) == done["usage"]["completion_tokens"]
    tools = [{"type": "function", "function": ADD}]
    chosen = {"tool_choice": {"type": "function", "function": {"name": "add"}}}
    whole = several.create_chat_completion(messages, tools=tools, **chosen, **limits)["choices"][0]
    calls = [call["function"] for call in whole["message"]["tool_calls"]]
    assert {call["name"] for call in calls} == {"add"}
    chunks = list(several.create_chat_completion(messages, tools=tools, stream=True, **chosen, **limits))
    deltas = [chunk["choices"][0]["delta"].get("tool_calls", ()) for chunk in chunks]
    pieces = [call["function"].get("arguments", "") for delta in deltas for call in delta]
    assert "".join(pieces).startswith("".join(call["arguments"] for call in calls))
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    legacy = several.create_chat_completion(messages, functions=[ADD], function_call={"name": "add"}, **limits)
    assert legacy["choices"][0]["message"]["tool_calls"]
    with pytest.raises(abcli.UsageError, match="logits_processor"):
        several.create_chat_completion(messages, tools=tools, logits_processor=llama_cpp.LogitsProcessorList())
    # The conversation goes on with what else is asked.
    assert several(PROMPTS[0], **GREEDY)["choices"][0]["text"]
    with closing(abcli.Llama(several.model_path, buckets=1, n_ctx=256, chat_format="chatml", verbose=False)) as named:
        assert named.create_chat_completion(messages, **GREEDY)["choices"]


def test_what_cannot_be_is_said(several: abcli.Llama, real_model: Path) -> None:
    with pytest.raises(abcli.UsageError, match="ctx"):
        _ = several.ctx
    with pytest.raises(ValueError, match="context window of 2048"):
        several("long " * 600)
    with pytest.raises(abcli.UsageError, match="embedding"):
        several.embed("x")
    with pytest.raises(abcli.UsageError, match="yarn_orig_ctx"):
        abcli.Llama(str(real_model), yarn_orig_ctx=99)
    with pytest.raises(abcli.UsageError, match="rope_freq_scale"):
        abcli.Llama(str(real_model), rope_freq_scale=0.5)
    with pytest.raises(abcli.ModelFileError):
        abcli.Llama("/nowhere.gguf")


def test_a_base_of_ones_own(tiny_model: Path) -> None:
    with closing(abcli.Llama(str(tiny_model), n_ctx=128, buckets=1, rope_freq_base=5e4, rope_freq_scale=1.0)) as llama:
        assert llama.llm.bases == (5e4,)
    with pytest.warns(UserWarning, match="bases of their own"):
        abcli.Llama(str(tiny_model), n_ctx=128, buckets=2, rope_freq_base=5e4).close()


def test_unknown_keywords_are_warned_of_once(tiny_model: Path) -> None:
    with pytest.warns(UserWarning, match="colour"):
        abcli.Llama(str(tiny_model), n_ctx=128, buckets=1, colour="red").close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        abcli.Llama(str(tiny_model), n_ctx=128, buckets=1, colour="red", use_mmap=True).close()


def test_closed_copied_and_embedded(tiny_model: Path) -> None:
    llama = abcli.Llama(str(tiny_model), n_ctx=0, buckets=2, embedding=True, verbose=False)
    assert llama.n_ctx() == 4096
    assert len(llama.create_embedding("Hello")["data"][0]["embedding"][0]) == llama.n_embd() == 64
    data = pickle.dumps(llama)
    llama.close()
    llama.close()
    with pytest.raises(abcli.UsageError, match="closed"):
        llama.tokenize(b"x")
    again = pickle.loads(data)
    assert again.llm.bases
    again.close()


def test_a_recurrent_model(tmp_path: Path) -> None:
    path = str(write_tiny_mamba(tmp_path / "model.gguf"))
    ours, original = (
        abcli.Llama(path, buckets=1, n_ctx=128, verbose=False),
        llama_cpp.Llama(path, n_ctx=128, verbose=False),
    )
    for prompt in ("Hello", "Hello there", "Hello"):
        assert ours(prompt, **GREEDY)["choices"] == original(prompt, **GREEDY)["choices"]
    ours.close()
    original.close()
