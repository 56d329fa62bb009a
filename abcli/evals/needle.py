"""The task `needle`: facts hidden in prose, each asked for by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from random import Random

from abcli.errors import EvaluationDataError, UsageError
from abcli.evals.placement import (
    QUESTIONS_PER_CONTEXT,
    asked_depths,
    check_settings,
    depth_range,
    most_that_fit,
    random_for,
)
from abcli.evals.prose import filler, passage, read_sentences
from abcli.evals.questions import CountTokens, Question, TaskSettings

FACTS_PER_1000_TOKENS = 20
LEAST_FACTS = 5
INSTRUCTION = "Secret codes are hidden in the text above."

ADJECTIVES = (
    "amber", "ancient", "arctic", "azure", "blue", "bold", "bright", "bronze", "calm", "clever", "copper", "coral",
    "cosmic", "crimson", "crystal", "curious", "daring", "distant", "eager", "electric", "emerald", "fearless",
    "fierce", "frozen", "gentle", "giant", "golden", "green", "hidden", "hollow", "humble", "iron", "ivory", "jolly",
    "lazy", "lively", "lonely", "lucky", "lunar", "marble", "mighty", "noble", "orange", "patient", "polite", "proud",
    "purple", "rapid", "red", "royal", "rusty", "sacred", "scarlet", "silent", "silver", "sleepy", "solar", "stormy",
    "swift", "tiny", "velvet", "violet", "wild", "yellow",
)  # fmt: skip
ANIMALS = (
    "badger", "bear", "beaver", "bison", "buffalo", "camel", "cat", "cheetah", "cobra", "crane", "crocodile", "crow",
    "deer", "dolphin", "donkey", "dragonfly", "duck", "eagle", "elephant", "falcon", "ferret", "fox", "frog", "gazelle",
    "giraffe", "goat", "goose", "hamster", "hawk", "hedgehog", "heron", "horse", "jaguar", "kangaroo", "koala", "lemur",
    "leopard", "lion", "lizard", "lobster", "monkey", "moose", "mouse", "octopus", "otter", "owl", "panda", "panther",
    "parrot", "penguin", "pigeon", "rabbit", "raven", "salmon", "shark", "spider", "squirrel", "swan", "tiger",
    "turtle", "walrus", "whale", "wolf", "zebra",
)  # fmt: skip
_CODES = range(10_000, 100_000)
# Long sentences may leave no place near a depth; then another passage is tried, and the last one taken as it is.
_ATTEMPTS = 12
# No tokenizer makes fewer tokens of prose: text with more characters per token needs no counting.
_MOST_CHARACTERS_PER_TOKEN = 40


@dataclass(frozen=True)
class Fact:
    """One hidden sentence."""

    name: str
    code: str

    @property
    def start(self) -> str:
        """The sentence up to the code."""
        return f"The secret code of the {self.name} is"

    @property
    def sentence(self) -> str:
        """The sentence as it stands in the context."""
        return f"{self.start} {self.code}."


def needle(settings: TaskSettings, count: CountTokens) -> Iterator[Question]:
    """Questions for 5-digit codes in prose, at most eight on one context, the asked depths in turn.

    The facts asked for stand at their depths, the others are spread evenly between them. `depth` is the number of
    characters before the fact divided by that before the last possible place. Prose comes from `settings.data`, a
    UTF-8 text file or a directory of .txt files, or is generated. Raises UsageError for settings below 1 or a
    length that cannot hold five facts and as much prose, EvaluationDataError for data that cannot be used.
    """
    check_settings(settings)
    per_fact = _tokens_per_fact(count)
    least = math.ceil(2 * LEAST_FACTS * per_fact)
    if settings.length < least:
        raise _too_short(settings.length, least)
    return islice(
        _questions(settings, count, _number_of_facts(settings.length, per_fact), _prose(settings, count)),
        settings.limit,
    )


def _tokens_per_fact(count: CountTokens) -> float:
    names = [f"{adjective} {animal}" for adjective, animal in zip(ADJECTIVES, ANIMALS, strict=True)]
    random = Random("needle/sample")  # noqa: S311
    facts = [Fact(name, str(code)) for name, code in zip(names, random.sample(_CODES, len(names)), strict=True)]
    return max(count(" ".join(fact.sentence for fact in facts)) / len(facts), 1.0)


def _number_of_facts(length: int, per_fact: float) -> int:
    # Where a tokenizer makes many tokens of a fact, half of the room is still prose.
    wanted = min(length * FACTS_PER_1000_TOKENS // 1000, int(length / (2 * per_fact)))
    return min(max(wanted, LEAST_FACTS), len(ADJECTIVES) * len(ANIMALS))


def _too_short(length: int, least: int) -> UsageError:
    return UsageError(
        f"a context of {length} tokens is too short for {LEAST_FACTS} facts in prose",
        f"this model needs at least {least} tokens for them",
    )


def _prose(settings: TaskSettings, count: CountTokens) -> Callable[[Random], Iterator[str]]:
    """What makes the sentences of a context, from the user's text or generated."""
    if settings.data is None:
        return filler
    sentences = read_sentences(settings.data)
    text = " ".join(sentences)
    if len(text) < settings.length * _MOST_CHARACTERS_PER_TOKEN:
        tokens = count(text)
        if tokens < settings.length:
            raise EvaluationDataError(
                f"the prose in {settings.data} has {tokens} tokens, a context needs {settings.length}",
                "give more prose, or a shorter `length`",
            )
    return lambda random: passage(sentences, random)


def _questions(
    settings: TaskSettings, count: CountTokens, number_of_facts: int, prose: Callable[[Random], Iterator[str]]
) -> Iterator[Question]:
    per_context = min(QUESTIONS_PER_CONTEXT, number_of_facts)
    context_number = 0
    while True:
        asked = asked_depths(settings.depths, context_number * per_context, per_context)
        targets, ranks = spread(asked, number_of_facts, settings.depths)
        facts = _facts(number_of_facts, random_for("needle", settings, context_number, "facts"))
        for attempt in range(_ATTEMPTS):
            sentences = prose(random_for("needle", settings, context_number, f"prose/{attempt}"))
            context, true_depths = _fill(facts, targets, sentences, settings.length, count)
            if _are_near([true_depths[rank] for rank in ranks], asked, settings.depths):
                break
        group = f"needle/{settings.length}/{context_number:04d}"
        for number, rank in enumerate(ranks):
            yield Question(
                identifier=f"{group}/{number}",
                group=group,
                context=context,
                text=f"{INSTRUCTION} What is the secret code of the {facts[rank].name}?",
                answer_start=facts[rank].start,
                answer=f" {facts[rank].code}",
                depth=true_depths[rank],
                length=settings.length,
            )
        context_number += 1


def _are_near(found: Sequence[float], asked: Sequence[float], depths: int) -> bool:
    ranges = [depth_range(depth, depths) for depth in asked]
    return all(low <= depth <= high for depth, (low, high) in zip(found, ranges, strict=True))


def _facts(number: int, random: Random) -> list[Fact]:
    """`number` facts; no name and no code comes twice."""
    names = random.sample(range(len(ADJECTIVES) * len(ANIMALS)), number)
    codes = random.sample(_CODES, number)
    return [
        Fact(f"{ADJECTIVES[name // len(ANIMALS)]} {ANIMALS[name % len(ANIMALS)]}", str(code))
        for name, code in zip(names, codes, strict=True)
    ]


def spread(asked: Sequence[float], number: int, depths: int) -> tuple[list[float], list[int]]:
    """The depths of `number` facts, ascending, and for each of `asked` the index of its fact.

    Each asked depth has a fact at it, or close by within its range of `depths` depths where it is asked for more
    than once. The others fill the gaps as evenly as that allows.
    """
    places: list[tuple[float, int]] = []
    for depth in sorted(set(asked)):
        askers = [index for index, other in enumerate(asked) if other == depth]
        low, high = depth_range(depth, depths)
        step = min(1 / max(number - 1, 1), (high - low) / len(askers))
        width = step * (len(askers) - 1)
        start = min(max(depth - width / 2, low), high - width)
        places += [(start + step * index, asker) for index, asker in enumerate(askers)]
    anchors = [place for place, _ in places]
    edges = [0.0, *anchors, 1.0]
    gaps = [after - before for before, after in pairwise(edges)]
    inside = [0] * len(gaps)
    for _ in range(number - len(anchors)):
        widest = max(range(len(gaps)), key=lambda index: gaps[index] / (inside[index] + 1))
        inside[widest] += 1
    others = [
        edges[index] + gaps[index] * (place + 1) / (inside[index] + 1)
        for index in range(len(gaps))
        for place in range(inside[index])
    ]
    targets = sorted([*anchors, *others])
    rank_of = {asker: targets.index(place) for place, asker in places}
    return targets, [rank_of[index] for index in range(len(asked))]


def _fill(
    facts: Sequence[Fact], targets: Sequence[float], source: Iterator[str], length: int, count: CountTokens
) -> tuple[str, list[float]]:
    """A context of `facts` at `targets` and as much prose as fits into `length` tokens, and the facts' true depths."""
    sentences: list[str] = []
    needles = [fact.sentence for fact in facts]

    def with_sentences(number: int) -> tuple[str, list[float]]:
        sentences.extend(islice(source, max(number - len(sentences), 0)))
        return arrange(needles, targets, sentences[:number])

    # Every sentence takes at least one token.
    fitting = most_that_fit(lambda number: count(with_sentences(number)[0]), length, length, guess=length // 25)
    if fitting < 0:
        raise _too_short(length, count(with_sentences(0)[0]))
    return with_sentences(fitting)


def arrange(needles: Sequence[str], targets: Sequence[float], sentences: Sequence[str]) -> tuple[str, list[float]]:
    """`sentences` in order with the needles between them, each as near to its target depth as sentences allow.

    `targets` ascend. The second result is the needles' true depths, by characters.
    """
    total = sum(len(text) + 1 for text in (*needles, *sentences)) - 1
    pieces: list[str] = []
    depths: list[float] = []
    position = used = 0
    for needle_text, target in zip(needles, targets, strict=True):
        last = max(total - len(needle_text), 0)
        while used < len(sentences) and position + (len(sentences[used]) + 1) / 2 <= target * last:
            pieces.append(sentences[used])
            position += len(sentences[used]) + 1
            used += 1
        depths.append(min(position / last, 1.0) if last else 0.0)
        pieces.append(needle_text)
        position += len(needle_text) + 1
    return " ".join([*pieces, *sentences[used:]]), depths
