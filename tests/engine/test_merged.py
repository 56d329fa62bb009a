"""Steps that merge where the logits lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from abcli.config import MergeRule
from abcli.engine.engine import Engine
from abcli.generate import Generator
from abcli.merge import Merger
from abcli.native.model import Model
from abcli.native.rotating.mixing import LogitsMixer
from abcli.native.rotating.turning import InGraph
from abcli.native.sampler import SamplerChain
from abcli.sampling import GenerationConfig, SamplingConfig
from tests.support.engines import fused_engine
from tests.support.models import open_model, set_up
from tests.support.tiny_gguf import write_tiny_model

BASES = (5_000.0, 10_000.0, 20_000.0)
TOKENS = [index * 7 % 250 for index in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with open_model(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")) as found:
        yield found


def engine(model: Model) -> Engine:
    return fused_engine(model, *set_up(bases=BASES, context_size=256, threads=2, slots=4))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LogitsMixer, "mixes_on_cpu", True)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("rule", ["confidence", "mean"])
def test_merged_logits_are_those_of_the_buckets(model: Model, rule: MergeRule) -> None:
    with engine(model) as plain, engine(model) as merging:
        # Slot 2 is idle between the others, and slot 3 gets its first logits with the end of its prompt.
        for one in (plain, merging):
            for slot in (0, 1, 2):
                one.prefill(slot, TOKENS[slot : slot + 30])
            one.begin(3, TOKENS)
        for token in (3, 5):
            tokens = {0: token, 1: token + 1} | ({3: 9} if token == 5 else {})
            wanted = {slot: logits.copy() for slot, logits in plain.step(tokens).items()}
            found = merging.step(tokens, rule)
            assert list(found) == list(wanted)
            assert 3 in found
            for slot, logits in wanted.items():
                merged = Merger(len(BASES), model.vocabulary_size).merge(logits, rule)
                assert found[slot].shape == (1, model.vocabulary_size)
                assert np.abs(found[slot][0] - merged.logits).max() < 2e-5
                assert merging.agreement(slot) == pytest.approx(merged.agreement, abs=1e-5)
        assert merging.step({0: 1}, "product")[0].shape == (3, model.vocabulary_size)
        assert merging.agreement(0) is None


@pytest.mark.usefixtures("on_cpu")
def test_rows_that_are_merged_stay_where_they_are(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[int] = []
    get = InGraph.get

    def counting(self: InGraph, original: Callable[..., None], *arguments: int) -> None:
        def copy(*where: int) -> None:
            came.append(where[-1])
            original(*where)

        get(self, copy, *arguments)

    monkeypatch.setattr(InGraph, "get", counting)
    everything = 4 * len(BASES) * model.vocabulary_size
    with engine(model) as one:
        one.prefill(0, TOKENS)
        wanted = one.step({0: 7})[0].copy()
        merged = Merger(len(BASES), model.vocabulary_size).merge(wanted, "mean").logits
        found = []
        for rule in ("mean", "mean", None, "mean"):
            one.truncate(0, len(TOKENS))
            came.clear()
            found.append((one.step({0: 7}, rule)[0].copy(), list(came)))
        # Whether a device can merge is known when it has.
        assert [sizes for _, sizes in found] == [[everything], [], [everything], []]
        np.testing.assert_array_equal(found[2][0], wanted)
        for row in (found[0][0], found[1][0], found[3][0]):
            assert np.abs(row[0] - merged).max() < 2e-5
        # Where merging fails all the same, they come.
        monkeypatch.setattr(LogitsMixer, "mix", lambda *_: None)
        one.truncate(0, len(TOKENS))
        came.clear()
        np.testing.assert_array_equal(one.step({0: 7}, "mean")[0], wanted)
        assert came == [everything]


@pytest.mark.parametrize("grammar", ["", 'root ::= "abc" [a-z]*'])
def test_answers_are_the_same(model: Model, grammar: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed: list[int] = []
    mix = LogitsMixer.mix

    def counting(self: LogitsMixer, *arguments: object) -> object:
        found = mix(self, *arguments)  # type: ignore[arg-type]
        mixed.append(found is not None)
        return found

    monkeypatch.setattr(LogitsMixer, "mix", counting)
    config = GenerationConfig(max_tokens=20, sampling=SamplingConfig(temperature=0.0, grammar=grammar or None))
    answers = []
    for on_cpu in (False, True):
        monkeypatch.setattr(LogitsMixer, "mixes_on_cpu", on_cpu)
        mixed.clear()
        with (
            engine(model) as one,
            Generator(one, model, lambda sampling: SamplerChain(model, sampling)) as generator,
        ):
            answer = list(generator.stream(0, TOKENS, config))[-1].answer
        answers.append(answer)
        # A grammar may want a token that the merged distribution has no number for.
        assert any(mixed) == (on_cpu and not grammar)
    first, second = answers
    assert first.tokens == second.tokens
    assert first.statistics.agreement == pytest.approx(second.statistics.agreement, abs=1e-5)
