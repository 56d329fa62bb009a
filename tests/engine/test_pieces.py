"""A long prompt that comes while others are answered: they go on, and nobody's answer changes."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import pytest

from abcli.config import Buckets, ContextConfig
from abcli.engine.make import Kind, make_engine
from abcli.generate import Generator
from abcli.native.context import Sequences
from abcli.native.sampler import SamplerChain
from abcli.sampling import GenerationConfig, SamplingConfig
from tests.support.models import open_model, set_up

BASES = (5_000.0, 10_000.0, 20_000.0)
PIECE = 256
LONG = [index * index % 251 for index in range(1300)]
SHORT = [[17 * slot + index * 7 % 83 for index in range(20 + 9 * slot)] for slot in range(4)]
GREEDY = GenerationConfig(SamplingConfig(temperature=0.0), max_tokens=40, ignore_eos=True)


def config(bases: tuple[float, ...], prefill: Any) -> tuple[ContextConfig, Buckets]:
    exact: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attention": "off"}
    sizes: dict[str, Any] = {"context_size": 1400, "slots": 5, "ubatch_size": PIECE, "threads": 2}
    return set_up(bases, prefill=prefill, **exact, **sizes)


@pytest.mark.parametrize("kind", ["contexts", "fused"])
@pytest.mark.parametrize(
    ("bases", "prefill", "length"), [(BASES[1:2], "exact", 1300), (BASES, "shared", 1300), (BASES, "exact", 700)]
)
def test_four_answers_advance_by_a_token_with_each_piece_of_a_long_prompt(
    tiny_model: Path, kind: Kind, bases: tuple[float, ...], prefill: Any, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0
    decode = Sequences.decode

    def counted(self: Sequences, parts: Any, logits: Any = ()) -> None:
        nonlocal largest
        largest = max(largest, sum(len(part.tokens) for part in parts))
        decode(self, parts, logits)

    monkeypatch.setattr(Sequences, "decode", counted)
    with (
        open_model(tiny_model) as model,
        make_engine(kind, model, *config(bases, prefill)) as engine,
        Generator(engine, model, lambda settings: SamplerChain(model, settings)) as generator,
    ):
        alone = [[piece.answer for piece in generator.stream(0, p, GREEDY)][-1].tokens for p in (*SHORT, LONG[:length])]
        engine.truncate(0, 0)
        answers = [generator.start(slot, prompt, GREEDY) for slot, prompt in enumerate(SHORT)]
        while not all(answer.tokens for answer in answers):
            generator.step()
        seen: list[tuple[int, int]] = []
        before = [len(answer.tokens) for answer in answers]
        answers.append(generator.start(4, LONG[:length], GREEDY, lambda done, total: seen.append((done, total))))
        steps = 0
        while not answers[4].tokens:
            gained = generator.step()
            steps += 1
            if steps + max(before) <= GREEDY.max_tokens:
                assert [piece.answer.slot for piece in gained][:4] == [0, 1, 2, 3]
        size = PIECE // (len(bases) if kind == "fused" and prefill == "exact" else 1)
        assert steps == ceil((length - (prefill == "shared")) / size)
        assert seen == [(min(size * n, length) if n < steps else length, length) for n in range(1, steps + 1)]
        assert [len(answer.tokens) for answer in answers[:4]] == [min(40, tokens + steps) for tokens in before]
        while generator.step():
            pass
    assert [answer.tokens for answer in answers] == alone
    assert largest <= PIECE


@pytest.mark.parametrize("kind", ["contexts", "fused"])
def test_a_prompt_is_dropped_within_a_piece_and_the_others_go_on(tiny_model: Path, kind: Kind) -> None:
    with (
        open_model(tiny_model) as model,
        make_engine(kind, model, *config(BASES, "auto")) as engine,
        Generator(engine, model, lambda settings: SamplerChain(model, settings)) as generator,
    ):
        (alone,) = ([piece.answer for piece in generator.stream(0, SHORT[1], GREEDY)][-1].tokens,)
        answer = generator.start(1, SHORT[1], GREEDY)
        generator.start(2, LONG, GREEDY)
        for _ in range(3):
            generator.step()
        generator.drop(2)
        assert (len(engine.tokens(2)), engine.waiting(2)) == (3 * PIECE, 0) or len(engine.tokens(2)) == 2 * PIECE
        while generator.step():
            pass
        assert answer.tokens == alone
        # What was computed is not computed again.
        again = generator.start(2, LONG, GREEDY)
        assert again.statistics.cached_tokens == len(engine.tokens(2)) >= 2 * PIECE
