"""A loaded model that answers: the object that commands, servers and notebooks stand on."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import abcli
from abcli.config import USUAL_GATE, profiles_directory
from abcli.profiles.store import save
from tests.profiles.samples import profile as sample_profile
from tests.support.models import checked_model
from tests.support.tiny_gguf import write_tiny_model

PLAIN: dict[str, Any] = {"temp": 0, "max_tokens": 12, "ignore_eos": True}
PROMPTS = [f"Say {word}" for word in ("one", "two", "three", "four", "five", "six", "seven")]


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[abcli.LLM]:
    # Caches of 32 bits, so that what runs beside an answer does not show in it.
    with abcli.load(
        tiny_model,
        buckets=2,
        slots=3,
        ctx_size=256,
        threads=1,
        engine="contexts",
        prefill="exact",
        flash_attn="off",
        cache_type_k="f32",
        cache_type_v="f32",
    ) as loaded:
        yield loaded


def test_an_answer_is_flat_and_frozen(llm: abcli.LLM) -> None:
    answer = llm.generate("Hello", **PLAIN)
    assert (answer.finish_reason, len(answer.tokens), answer.usage.completion_tokens) == ("length", 12, 12)
    assert answer.usage.prompt_tokens == len(llm.prompt_tokens("Hello"))
    assert answer.timings.prefill > 0
    assert answer.timings.decode > 0
    assert 0 <= answer.agreement <= 1
    assert 0 <= answer.seed < 2**32
    with pytest.raises(FrozenInstanceError):
        answer.text = "another"  # type: ignore[misc]


def test_a_gate_is_a_models_or_an_answers(tiny_model: Path) -> None:
    with abcli.load(tiny_model, buckets=2, ctx_size=256, threads=1, gate=0, slots=2) as gated:
        assert gated.generate("Hello", **PLAIN).asked == 0
        asked = gated.generate("Hello", gate="off", **PLAIN)
        assert asked.asked == 1
        assert gated.generate_many(PROMPTS[:3], gate=1, **PLAIN)[0].asked == 1
        chat = gated.chat(**PLAIN)
        assert chat.send("Hello").asked == 0
        chat.set("gate", "1")
        assert (chat.settings()["gate"], chat.send("And?").asked) == ("1", 1)
        chat.set("gate", "off")
        assert (chat.settings()["gate"], chat.send("So?").asked) == ("off", 1)
        for wrong in ("2", "nan", "", "on"):
            with pytest.raises(abcli.UsageError, match="gate"):
                chat.set("gate", wrong)
        for bad in (True, -0.1, "0.5"):
            with pytest.raises(abcli.UsageError, match="gate"):
                gated.generate("Hello", gate=bad)
    with pytest.raises(abcli.UsageError, match="gate"):
        abcli.load(tiny_model, gate=7)


def test_a_stream_is_the_answer_in_pieces(llm: abcli.LLM) -> None:
    pieces = list(llm.stream("Hello", **PLAIN))
    whole = pieces[-1].answer
    assert whole is not None
    assert all(piece.answer is None for piece in pieces[:-1])
    assert "".join(piece.text for piece in pieces) == whole.text == llm.generate("Hello", **PLAIN).text


def test_a_prompt_is_a_text_or_messages(llm: abcli.LLM) -> None:
    text = llm.generate("Hello", **PLAIN).text
    assert llm.generate([{"role": "user", "content": "Hello"}], **PLAIN).text == text
    assert llm.generate([abcli.Message("user", "Hello")], **PLAIN).text == text
    assert llm.prompt_tokens("Hello", raw=True) == llm.tokenize("Hello")
    assert len(llm.prompt_tokens("Hello")) > len(llm.tokenize("Hello"))


@pytest.mark.parametrize("prompt", ["", "  ", [], [{"role": "user"}], [{"role": "nobody", "content": "x"}], ["Hello"]])
def test_what_is_no_prompt(llm: abcli.LLM, prompt: Any) -> None:
    with pytest.raises(abcli.PromptError):
        llm.generate(prompt)


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"top_p": 2}, "top_p"),
        ({"temp": "warm"}, "temp"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"heat": 1}, "heat"),
    ],
)
def test_an_error_names_the_setting(llm: abcli.LLM, settings: dict[str, Any], setting: str) -> None:
    with pytest.raises(abcli.UsageError) as caught:
        llm.generate("Hello", **settings)
    assert caught.value.setting == setting
    assert f"`{setting}`" in caught.value.message or setting == "temp"
    assert "--" not in caught.value.message + caught.value.hint
    assert llm.generate("Hello", **PLAIN).text


def test_many_answers_are_those_of_one_at_a_time(llm: abcli.LLM) -> None:
    done: list[int] = []
    answers = llm.generate_many(iter(PROMPTS), on_done=done.append, **PLAIN)
    assert [answer.tokens for answer in answers] == [llm.generate(prompt, **PLAIN).tokens for prompt in PROMPTS]
    assert done == [1, 2, 3, 4, 5, 6, 7]
    assert llm.generate_many([]) == []


def test_one_bad_prompt_of_many_leaves_the_model_usable(llm: abcli.LLM) -> None:
    with pytest.raises(abcli.ContextFullError):
        llm.generate_many([*PROMPTS, "long " * 300], **PLAIN)
    assert llm.generate_many(PROMPTS[:2], **PLAIN)


def test_a_chat_computes_nothing_twice(real_model: Path) -> None:
    with abcli.load(real_model, buckets=1, ctx_size=512) as llm:
        chat = llm.chat(system="Be brief", temp=0, max_tokens=12)
        first = chat.send("Hello")
        second = chat.send("Again")
    assert second.usage.cached_tokens >= first.usage.prompt_tokens + first.usage.completion_tokens - 1
    roles = [message.role for message in chat.conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert chat.conversation.messages[2].content == first.text


def test_logits_are_each_buckets_own(llm: abcli.LLM) -> None:
    tokens = llm.tokenize("Hello there")
    logits = llm.logits(tokens)
    assert logits.shape == (2, llm.vocabulary_size)
    assert logits.dtype == np.float32
    again = llm.logits(tokens)
    np.testing.assert_allclose(logits, again, atol=1e-4)
    assert not np.shares_memory(logits, again)
    for wrong in ([], [-1], [llm.vocabulary_size]):
        with pytest.raises(abcli.PromptError):
            llm.logits(wrong)


def test_threads_wait_for_each_other(llm: abcli.LLM) -> None:
    alone = {prompt: llm.generate(prompt, **PLAIN).tokens for prompt in PROMPTS}
    found: dict[str, tuple[int, ...]] = {}

    def ask(prompt: str) -> None:
        found[prompt] = llm.generate(prompt, **PLAIN).tokens

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == alone


def test_an_open_stream_keeps_its_turn(llm: abcli.LLM) -> None:
    stream = llm.stream("Hello", **PLAIN)
    next(stream)
    with pytest.raises(abcli.UsageError, match="still being streamed"):
        llm.generate("Hello", **PLAIN)
    stream.close()  # type: ignore[attr-defined]
    assert llm.generate("Hello", **PLAIN).text


def test_cancel_from_another_thread_stops_an_answer(llm: abcli.LLM) -> None:
    stream = llm.stream("Hello", temp=0, ignore_eos=True)
    next(stream)
    threading.Thread(target=llm.cancel).start()
    with pytest.raises(abcli.CancelledError):
        for _ in stream:
            pass
    llm.cancel()  # nothing is computed: nothing happens
    assert llm.generate("Hello", **PLAIN).text


def test_two_models_at_once_and_closing(tiny_model: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other.gguf", seed=5)
    with abcli.load(tiny_model, buckets=1, ctx_size=128) as one, abcli.load(other, buckets=2, ctx_size=128) as two:
        texts = one.generate("Hello", **PLAIN).text, two.generate("Hello", **PLAIN).text
        assert texts[0] != texts[1]
        assert one.generate("Hello", **PLAIN).text == texts[0]
    with pytest.raises(abcli.UsageError, match="closed"):
        one.generate("Hello")
    one.close()


def test_a_profile_decides_unless_buckets_are_asked_for(tiny_model: Path) -> None:
    model = checked_model(tiny_model)
    profile = sample_profile(fingerprint=model.fingerprint, native_base=model.header.native_base, gate=0.8)
    save(profile, profiles_directory())
    wanted = {"auto": profile.bases, "none": None}
    for name, bases in wanted.items():
        with abcli.load(tiny_model, profile=name, ctx_size=128) as llm:
            assert (llm.bases == bases) == (bases is not None)
            assert (llm.profile is not None) == (bases is not None)
            assert llm.buckets.gate == (0.8 if bases else USUAL_GATE)
    with abcli.load(tiny_model, buckets=2, ctx_size=128) as llm:
        assert (len(llm.bases), llm.profile) == (2, None)
    with pytest.raises(abcli.UsageError, match="profile"):
        abcli.load(tiny_model, buckets=2, profile=profile.name)
    with pytest.raises(abcli.ProfileError):
        abcli.load(tiny_model, profile="nothing")


@pytest.mark.parametrize(
    "settings",
    [
        {"buckets": 0},
        {"buckets": 99},
        {"bases": [1e4], "multipliers": [1.0]},
        {"weights": [1.0]},
        {"merge": "loudest"},
        {"spread": "wide"},
        {"engine": "steam"},
        {"flash_attn": "maybe"},
        {"ctx_size": -1},
        {"slots": 0},
        {"gpu_layers": -2},
        {"cache_type_v": "q8_0", "flash_attn": "off"},
        {"colour": "red"},
    ],
    ids=str,
)
def test_settings_that_make_no_sense(tiny_model: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(abcli.UsageError) as caught:
        abcli.load(tiny_model, **settings)
    assert caught.value.hint
    assert "--" not in caught.value.message + caught.value.hint


def test_the_package_hands_on_its_names_without_importing_all_of_them() -> None:
    program = (
        "import sys, abcli\n"
        "assert 'llama_cpp' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert all(getattr(abcli, name) is not None for name in abcli.__all__)\n"
        "assert abcli.load.__module__ == 'abcli.llm.loading' and abcli.merge.Merger is abcli.Merger\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    with pytest.raises(AttributeError):
        _ = abcli.nothing


def test_a_notebook_shows_where_the_buckets_disagree(llm: abcli.LLM) -> None:
    answer = llm.generate("Hello", **PLAIN)
    assert "".join(text for text, _ in answer.spans) == answer.text
    shown = [agreement for _, agreement in answer.spans]
    assert all(agreement is not None and 0 <= agreement <= 1 for agreement in shown)
    hostile = replace(answer, spans=(("<script>alert(1)</script>\n", 0.25), ("&", None)))
    page = hostile._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "agreement 25%" in page
    assert "rgba(255, 140, 0, 0.56)" in page
    assert "one bucket decided" in page


def test_prompts_are_taken_when_a_slot_is_free(llm: abcli.LLM) -> None:
    taken: list[str] = []
    done: list[int] = []

    def prompts() -> Iterator[str]:
        for prompt in PROMPTS:
            assert len(taken) < 3 + len(done)
            taken.append(prompt)
            yield prompt

    answers = llm.generate_many(prompts(), on_done=done.append, **PLAIN)
    assert len(answers) == len(PROMPTS)
    assert done == list(range(1, len(PROMPTS) + 1))
    # Those of an endless iterable come one by one.
    endless = (llm.ask("Hello", *llm.split(PLAIN)) for _ in iter(int, 1))
    some = llm.answer_many(endless)
    assert len({next(some)[1].text for _ in range(4)}) == 1
    some.close()  # type: ignore[attr-defined]
    assert llm.generate("Hello", **PLAIN).text
