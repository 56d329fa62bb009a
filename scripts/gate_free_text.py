"""What a gate changes in free text: everyday questions answered greedily without a gate, and with some.

For each threshold is printed, along the answers without a gate: for which share of the tokens all buckets would be
asked, the mean Kullback-Leibler divergence per token of what decides from what the merge says (0 where all are asked),
and for how many answers the first of them that the gate would choose otherwise does not exist. For the thresholds of
`--answer` the answers are computed, too, and compared. With `--output` each answer is a line of a file as soon as it is
there, and what the file has is not computed again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import abcli
from abcli.calibrate.gates import GATES
from abcli.chat.asking import Asked
from abcli.rope.bases import nearest_base
from abcli.sampling import Choice


@dataclass(frozen=True)
class Text:
    """An answer, and of each of its tokens: the native bucket's largest probability, whether its likeliest token is
    that of the merge, and the divergence of its distribution from the merged one in nats; without a gate only."""

    gate: float
    prompt: int
    tokens: tuple[int, ...]
    asked: float
    sure: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities [vocabulary] of logits."""
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


class Watched:
    """Writes down for each token what the native bucket alone says, and what all say."""

    def __init__(self, native: int) -> None:
        self._native = native
        self.sure: list[float] = []
        self.same: list[bool] = []
        self.divergence: list[float] = []

    def __call__(self, choice: Choice) -> None:
        own, merged = log_softmax(choice.logits[self._native]), log_softmax(choice.merged)
        self.sure.append(float(np.exp(own.max())))
        self.same.append(bool(own.argmax() == merged.argmax()))
        weights = np.exp(merged)
        self.divergence.append(float((weights * (merged - own))[weights > 0].sum()))


def answers(llm: abcli.LLM, prompts: Sequence[str], wanted: Sequence[int], gate: float, tokens: int) -> Iterator[Text]:
    """The answers to the prompts with the numbers `wanted`, as they are finished; a gate of 1 is none."""
    native = nearest_base(llm.bases, llm.model.header.native_base)
    watched: dict[int, Watched] = {}

    def asked() -> Iterator[Asked]:
        for number in wanted:
            options, config = llm.split({"temp": 0, "max_tokens": tokens, "gate": gate if gate < 1 else None})
            if gate == 1:
                watched[number] = Watched(native)
            yield llm.ask(prompts[number], options, replace(config, observer=watched.get(number)))

    for place, answer in llm.answer_many(asked()):
        number = wanted[place]
        seen: dict[str, Any] = vars(watched[number]) if gate == 1 else {}
        steps = {name: seen[name] for name in ("sure", "same", "divergence") if name in seen}
        yield Text(gate, number, tuple(answer.tokens), answer.asked, **steps)


def read_texts(path: Path) -> list[Text]:
    """The answers in a file, which need not be there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Text(**{**values, "tokens": tuple(values["tokens"])}) for values in map(json.loads, lines)]


def summary(texts: Sequence[Text], gate: float) -> dict[str, float]:
    """What a gate changes along the answers without one, and in those that were computed with it."""
    without = {text.prompt: text for text in texts if text.gate == 1}
    decides = {number: np.array(text.sure) > gate for number, text in without.items()}
    steps = np.concatenate(list(decides.values()))
    divergence = [np.where(decides[number], text.divergence, 0.0).mean() for number, text in without.items()]
    kept = [bool(np.all(np.array(text.same)[decides[number]])) for number, text in without.items()]
    found = {
        "gate": gate,
        "texts": len(without),
        "tokens": len(steps),
        "asked": 1 - float(steps.mean()),
        "divergence": float(np.mean(divergence)),
        "divergence_error": float(np.std(divergence, ddof=1) / len(divergence) ** 0.5),
        "kept": float(np.mean(kept)),
    }
    computed = [text for text in texts if text.gate == gate and text.prompt in without]
    if computed:
        found["computed"] = len(computed)
        found["computed_asked"] = float(np.mean([text.asked for text in computed]))
        found["computed_equal"] = float(np.mean([text.tokens == without[text.prompt].tokens for text in computed]))
    return found


def main() -> None:
    """Answer, or read what was answered before, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--prompts", type=int, default=100, help="how many of the everyday prompts of abcli tune")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--answer", type=float, nargs="*", default=[], metavar="GATE", help="answer with these, too")
    parser.add_argument("--slots", type=int, default=8, help="answers at once")
    parser.add_argument("--threads", "-t", type=int, default=0)
    parser.add_argument("--output", "-o", type=Path, help="file for the answers, JSON lines; what it has is kept")
    chosen = parser.parse_args()
    prompts = files("abcli.tune").joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()[: chosen.prompts]
    texts = read_texts(chosen.output) if chosen.output else []
    usual = {"profile": "none", "ctx_size": 1024, "engine": "fused"}
    with abcli.load(chosen.model, slots=chosen.slots, threads=chosen.threads, gate=0.5, **usual) as llm:
        for gate in (1.0, *chosen.answer):
            there = {text.prompt for text in texts if text.gate == gate}
            wanted = [number for number in range(len(prompts)) if number not in there]
            for text in answers(llm, prompts, wanted, gate, chosen.tokens):
                texts.append(text)
                if chosen.output:
                    with chosen.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(vars(text)) + "\n")
    found = [summary(texts, gate) for gate in (0.0, *sorted({*GATES, *chosen.answer}))]
    for one in found:
        print(*(f"{name} {value:.4g}" for name, value in one.items()), sep="  ")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
