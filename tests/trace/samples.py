"""Traces that no model made."""

from __future__ import annotations

import numpy as np

from abcli.trace.trace import STRONGEST, Attention, Candidate, Step, Trace, View, passages_of


def made_trace(prompt, answer, *, buckets=3, model="model.gguf", attention=True, seed=0):
    """A trace of the texts of tokens, with numbers out of a hat."""
    random = np.random.default_rng(seed)

    def shares(*shape):
        values = random.random(shape) ** 4
        return (values / values.sum(axis=-1, keepdims=True)).astype(np.float32)

    def candidates(first):
        probabilities = np.sort(shares(6))[::-1]
        others = [text for text in answer if text != first][:4] or ["other"]
        texts = [first, *others]
        return tuple(
            Candidate(index, text, float(p)) for index, (text, p) in enumerate(zip(texts, probabilities, strict=False))
        )

    steps = []
    for index, text in enumerate(answer):
        alone = index % 5 == 4
        weights = [1.0] if alone else shares(buckets).tolist()
        views = tuple(
            View(1 if alone else bucket, weight, float(random.random()), candidates(text if bucket else f"{text}!"))
            for bucket, weight in enumerate(weights)
        )
        agreement = None if alone else float(random.random())
        merged = views[0].candidates if alone else candidates(text)
        steps.append(Step(index, text, agreement, float(random.random()), merged, views))
    passages = passages_of(prompt)
    kept = min(STRONGEST, len(prompt))
    found = None
    if attention and answer:
        strongest = np.stack(
            [np.stack([random.permutation(len(prompt))[:kept] for _ in range(buckets + 1)]) for _ in range(len(answer))]
        ).astype(np.int32)
        found = Attention(
            heads=((0, 1), (3, 2)),
            steps=len(answer),
            whole=shares(buckets + 1, len(prompt)),
            passages=shares(len(answer), buckets + 1, len(passages)),
            strongest=strongest,
            strongest_weights=-np.sort(-shares(len(answer), buckets + 1, kept)),
            by_distance=shares(buckets, max(1, len(prompt) - 1)),
        )
    bases = tuple(10000.0 * 2.0 ** (bucket - 1) for bucket in range(buckets))
    return Trace(
        model=model,
        native_base=10000.0,
        bases=bases,
        native=min(1, buckets - 1),
        merge="confidence",
        prompt_tokens=tuple(range(len(prompt))),
        prompt=tuple(prompt),
        passages=passages,
        steps=tuple(steps),
        waves=shares(buckets, len(prompt)),
        attention=found,
        without_attention="" if found else "no weights",
    )
