"""Traces of a real engine: their numbers are the engine's."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from abcli import load
from abcli.engine.memory import Room
from abcli.errors import UsageError
from abcli.merge import Merger
from abcli.trace import attention
from abcli.trace.page import save_trace, trace_page
from abcli.trace.recorder import CANDIDATES

PROMPT = "tell me about the house on the hill and the road that leads to it, " * 2


@pytest.fixture(scope="module", params=["fused", "contexts"])
def llm(request, tiny_model):
    with load(tiny_model, multipliers=(0.5, 1, 2), ctx_size=512, threads=1, engine=request.param) as loaded:
        yield loaded


def test_numbers_are_the_engines(llm):
    choices = []

    def keep(choice):
        choices.append(replace(choice, logits=choice.logits.copy(), merged=choice.merged.copy()))

    answer = llm.generate(PROMPT, max_tokens=6, seed=3, temperature=1.0, trace=True, observer=keep)
    trace = answer.trace
    assert [step.token for step in trace.steps] == [choice.token for choice in choices]
    assert trace.bases == llm.bases
    assert trace.native == 1
    merger = Merger(3, llm.vocabulary_size)
    for step, choice in zip(trace.steps, choices, strict=True):
        merged = merger.merge(choice.logits, "confidence")
        assert step.agreement == pytest.approx(merged.agreement, abs=1e-4)
        probabilities = np.exp(merged.log_probabilities.astype(np.float64))
        assert step.probability == pytest.approx(probabilities[choice.token], abs=1e-4)
        best = np.sort(probabilities)[::-1][:CANDIDATES]
        assert [one.probability for one in step.candidates] == pytest.approx(best.tolist(), abs=1e-4)
        for view, logits, weight in zip(step.views, choice.logits, merged.weights, strict=True):
            own = np.exp(logits.astype(np.float64) - logits.max())
            own /= own.sum()
            assert view.weight == pytest.approx(weight, abs=1e-4)
            assert view.probability == pytest.approx(own[choice.token], abs=1e-4)
            assert view.candidates[0].token == logits.argmax()
            assert [one.probability for one in view.candidates] == pytest.approx(
                np.sort(own)[::-1][:CANDIDATES].tolist(), abs=1e-4
            )


def test_a_trace_tells_the_text_it_was_made_of(llm):
    answer = llm.generate(PROMPT, max_tokens=5, temperature=0, trace=True)
    trace = answer.trace
    assert "".join(trace.prompt).endswith("<|im_start|>assistant\n")
    assert PROMPT in "".join(trace.prompt)
    assert trace.passages[0][0] == 0
    assert trace.passages[-1][1] == len(trace.prompt)
    attention = trace.attention
    assert attention.steps == len(trace.steps)
    # The first row sees nothing but the prompt; later ones see a little of the answer, too.
    np.testing.assert_allclose(attention.passages[0].sum(axis=1), 1, atol=1e-3)
    assert (attention.whole.sum(axis=1) <= 1.001).all()
    assert trace.waves.shape == (3, len(trace.prompt))
    assert trace.waves[:, 0] == pytest.approx(1)
    told = json.loads(json.dumps(trace.fields()))
    assert told["steps"][0]["views"][2]["weight"] == pytest.approx(trace.steps[0].views[2].weight, abs=1e-6)
    assert llm.generate(PROMPT, max_tokens=5, temperature=0).trace is None


def test_the_same_answer_traced_afterwards_is_the_same(llm):
    answer = llm.generate(PROMPT, max_tokens=5, temperature=0, trace=True)
    again = llm.trace(answer.trace.prompt_tokens, [step.token for step in answer.trace.steps])
    assert [step.token for step in again.steps] == [step.token for step in answer.trace.steps]
    for before, after in zip(answer.trace.steps, again.steps, strict=True):
        assert after.text == before.text
        assert after.agreement == pytest.approx(before.agreement, abs=1e-3)
        assert [view.weight for view in after.views] == pytest.approx([v.weight for v in before.views], abs=1e-3)
    np.testing.assert_allclose(again.attention.whole, answer.trace.attention.whole, atol=1e-3)


def test_where_one_bucket_decides_alone_only_it_is_shown(llm):
    trace = llm.generate(PROMPT, max_tokens=3, temperature=0, trace=True, gate=0.0).trace
    for step in trace.steps:
        assert [view.bucket for view in step.views] == [1]
        assert step.agreement is None
        assert not step.differs(trace.native)
    np.testing.assert_allclose(trace.attention.whole[3], trace.attention.whole[1], atol=1e-6)


def test_an_answer_too_long_to_look_back_from_is_not_lost(llm, monkeypatch):
    monkeypatch.setattr(attention, "free_room", lambda _layers: Room(0))
    answer = llm.generate(PROMPT, max_tokens=3, temperature=0, trace=True)
    assert answer.trace.attention is None
    assert "of memory beside the engine" in answer.trace.without_attention
    assert len(answer.trace.steps) == 3
    assert "could not be read: to read the attention" in trace_page(answer.trace)


def test_a_chat_traces_its_last_answer(llm):
    chat = llm.chat(max_tokens=4, temperature=0)
    with pytest.raises(UsageError, match="no answer to trace"):
        chat.trace()
    answer = chat.send(PROMPT)
    trace = chat.trace()
    assert [step.token for step in trace.steps][: len(answer.tokens)] == list(answer.tokens)
    # The chat goes on.
    assert chat.send("and then").usage.cached_tokens > 0


def test_only_what_a_trace_is_written_as_can_be_named(llm, tmp_path):
    trace = llm.generate("hello", max_tokens=1, trace=True).trace
    save_trace(trace, tmp_path / "trace.html")
    save_trace(trace, tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["model"] == trace.model
    for name, what in (("trace.txt", "cannot be written as"), ("missing/trace.html", "cannot be written")):
        with pytest.raises(UsageError, match=what):
            save_trace(trace, tmp_path / name)
