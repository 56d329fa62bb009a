"""A tuning is learned: better where they are asked to be, near the untuned model elsewhere, however interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from abcli.config import UNTUNED, Tuning
from abcli.errors import UnsupportedModelError
from abcli.evals.prompts import TokenizedQuestion
from abcli.tune.settings import Kind, Step, TrainingSettings
from tests.support.models import checked_model
from tests.support.tiny_gguf import write_tiny_model

torch = pytest.importorskip("torch", reason="abcli[tune] is not installed")
from torch.nn.functional import kl_div, nll_loss  # noqa: E402

from abcli.tune.batches import asked_rows, text_rows  # noqa: E402
from abcli.tune.guard import Guard  # noqa: E402
from abcli.tune.training import Learner  # noqa: E402
from abcli.tune.twin import Heads, Twin  # noqa: E402

SETTINGS = TrainingSettings(steps=6, contexts=2, rate=0.1)
KINDS: list[tuple[Kind, ...]] = [("gains",), ("multipliers",), ("gains", "multipliers")]
random = np.random.default_rng(11)


def tokens(count: int) -> tuple[int, ...]:
    return tuple(int(token) for token in random.integers(40, 300, count))


def group() -> list[TokenizedQuestion]:
    """Two questions on one context."""
    context = tokens(20)
    return [TokenizedQuestion((*context, *tokens(4)), (tokens(3),)) for _ in range(2)]


GROUPS = [group() for _ in range(3)]
TEXTS = [tokens(30) for _ in range(2)]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Twin:
    path = write_tiny_model(tmp_path_factory.mktemp("twin") / "model.gguf")
    return Twin(checked_model(path), torch.device("cpu"))


@pytest.fixture(scope="module")
def guards(twin: Twin) -> list[list[Guard]]:
    return [[Guard(twin, TEXTS[0]), Guard(twin, TEXTS[1], 10)]]


def as_tensors(tuning: Tuning) -> Heads:
    gains, multipliers = (torch.tensor(numbers) if numbers else None for numbers in (tuning.gains, tuning.multipliers))
    return Heads(gains, multipliers)


def mean_loss(twin: Twin, tuning: Tuning) -> float:
    asked = asked_rows(GROUPS)
    with torch.no_grad():
        return float(asked.loss(twin.logits(asked.rows, as_tensors(tuning), asked.wanted)))


def test_a_row_asks_what_each_question_asks_alone(twin: Twin) -> None:
    """Several contexts in rows of different lengths, several answers in a row."""
    groups = [*GROUPS, [TokenizedQuestion(tokens(50), (tokens(5),))]]

    def loss(of: list[list[TokenizedQuestion]]) -> float:
        asked = asked_rows(of)
        with torch.no_grad():
            return float(asked.loss(twin.logits(asked.rows, Heads(), asked.wanted)))

    alone = [loss([[question]]) for group in groups for question in group]
    assert loss(groups) == pytest.approx(np.mean(alone), abs=1e-4)


def test_blocks_of_queries_see_what_one_block_sees(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several answers on one context, in blocks that end within it, at the end of an answer and within one."""
    asked = asked_rows(GROUPS)

    def logits() -> list[list[float]]:
        with torch.no_grad():
            found: list[list[float]] = twin.logits(asked.rows, Heads(), asked.wanted).tolist()
        return found

    whole = logits()
    for block in (1, 7, asked.rows.tokens.shape[1] - 1):
        monkeypatch.setattr("abcli.tune.twin._BLOCK", block)
        np.testing.assert_allclose(logits(), whole, atol=1e-5)


@pytest.mark.parametrize("kinds", KINDS)
def test_learning_lowers_the_loss(twin: Twin, guards: list[list[Guard]], kinds: tuple[Kind, ...]) -> None:
    tuning = Learner(twin, replace(SETTINGS, steps=30, learned=kinds)).learn(GROUPS, guards)
    assert mean_loss(twin, tuning) < mean_loss(twin, UNTUNED) - 0.05
    for kind, shape in twin.shapes.items():
        numbers = getattr(tuning, kind)
        assert [*map(len, numbers)] == ([shape[1]] * shape[0] if kind in kinds else [])
        assert all(round(number, 4) == number for layer in numbers for number in layer)


def test_a_guard_keeps_the_model_what_it_was(twin: Twin, guards: list[list[Guard]]) -> None:
    def divergence(weight: float) -> float:
        tuning = Learner(twin, replace(SETTINGS, steps=30, guard_weight=weight)).learn(GROUPS, guards)
        return float(sum(guard.drift(as_tensors(tuning)).divergence for guard in guards[0]))

    loose, tight = divergence(0.0), divergence(100.0)
    assert tight < loose / 4
    gains, multipliers = (torch.ones(twin.shapes[kind]) for kind in KINDS[-1])
    assert float(guards[0][0].drift(Heads(gains, multipliers)).divergence) == pytest.approx(0, abs=1e-6)
    assert float(guards[0][1].drift(Heads(1.5 * gains)).divergence) > 1e-3
    assert float(guards[0][1].drift(Heads(None, 1.5 * multipliers)).divergence) > 1e-3


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("gain", [0.5, 0.9, 1.1, 1.5])
def test_a_guard_tells_how_far_a_model_is(twin: Twin, gain: float, own: bool) -> None:
    """Against what torch itself computes: divergence, and the loss on a text's own tokens after its context."""
    text, begin, gains = TEXTS[1], 10, torch.full(twin.shapes["gains"], gain)
    rows, wanted = text_rows([text], [begin])
    with torch.no_grad():
        untuned, tuned = (twin.logits(rows, heads, wanted).log_softmax(-1) for heads in (Heads(), Heads(gains)))
        drift = Guard(twin, text, begin, own=own).drift(Heads(gains))
    following = torch.tensor(text[begin:])
    loss = float(nll_loss(tuned, following) - nll_loss(untuned, following))
    divergence = float(kl_div(tuned, untuned, log_target=True, reduction="batchmean"))
    expected = divergence if own else divergence + max(loss, 0)
    assert [float(part) for part in (drift.divergence, drift.loss, drift.penalty)] == pytest.approx(
        [divergence, loss, expected], abs=1e-5
    )


@pytest.mark.parametrize("kinds", KINDS)
def test_one_number_is_that_of_all_heads(twin: Twin, kinds: tuple[Kind, ...]) -> None:
    tuning = Learner(twin, replace(SETTINGS, single=True, learned=kinds)).learn(GROUPS, [])
    for kind in kinds:
        numbers = getattr(tuning, kind)
        assert len(numbers) == twin.shapes[kind][0]
        assert {number for layer in numbers for number in layer} != {1.0}
        assert len({number for layer in numbers for number in layer}) == 1


class StopError(Exception):
    """An interruption."""


@pytest.mark.parametrize("frugal", [False, True])
def test_going_on_gives_what_not_stopping_gives(
    twin: Twin, guards: list[list[Guard]], tmp_path: Path, frugal: bool
) -> None:
    settings = replace(SETTINGS, learned=KINDS[-1])
    whole = Learner(twin, settings, frugal=frugal)
    wanted = whole.learn(GROUPS, guards)
    file = tmp_path / "folder" / "half.pt"

    def stop(step: Step) -> None:
        if step.number in (1, 4):
            raise StopError

    for _ in range(2):
        with pytest.raises(StopError):
            Learner(twin, settings, file, frugal=frugal).learn(GROUPS, guards, stop)
    last = Learner(twin, settings, file, frugal=frugal)
    assert len(last.steps) == 4
    assert last.learn(GROUPS, guards) == wanted
    assert last.steps == whole.steps
    # What is done is not done again.
    assert Learner(twin, settings, file).learn(GROUPS, guards, stop) == wanted


def test_another_seed_takes_another_order(twin: Twin) -> None:
    first, again, other = (Learner(twin, replace(SETTINGS, seed=seed)).learn(GROUPS, []) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "another model"])
def test_a_damaged_file_is_begun_anew(twin: Twin, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "half.pt"
    wanted = Learner(twin, SETTINGS, file).learn(GROUPS, [])
    data = file.read_bytes()
    file.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"text"}.get(damage, data))
    if damage == "another model":
        Learner(twin, replace(SETTINGS, single=True), tmp_path / "other.pt").learn(GROUPS, [])
        (tmp_path / "other.pt").replace(file)
    learner = Learner(twin, SETTINGS, file)
    assert learner.steps == []
    assert learner.learn(GROUPS, []) == wanted


def test_time_ends_it_too(twin: Twin) -> None:
    learner = Learner(twin, replace(SETTINGS, steps=1000, seconds=1e-6))
    learner.learn(GROUPS, [])
    assert [(step.number, step.share) for step in learner.steps] == [(1, 1.0)]


def test_answers_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    tensors = {"blk.1.ffn_norm.weight": np.full(64, np.inf, np.float32)}
    path = write_tiny_model(tmp_path / "model.gguf", tensors=tensors)
    learner = Learner(Twin(checked_model(path), torch.device("cpu")), SETTINGS, tmp_path / "half.pt")
    with pytest.raises(UnsupportedModelError, match="no numbers in torch"):
        learner.learn(GROUPS, [])
    assert not (tmp_path / "half.pt").exists()
