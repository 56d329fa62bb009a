"""Traces questions with an engine, and keeps the traces so that nothing is computed twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from abcli.engine.engine import Engine
from abcli.evals.prompts import TokenizedQuestion
from abcli.evals.traces import Trace, load, save, trace


@dataclass(frozen=True)
class TraceStore:
    """Traces on the disk, one file each. `directory` is None for a store that keeps nothing.

    The directory's name must stand for all that a trace depends on besides question and bases: model, build, prefill.
    """

    directory: Path | None

    def get(self, question: TokenizedQuestion, bases: Sequence[float]) -> Trace | None:
        """A stored trace of `question` that has all of `bases`."""
        if self.directory is None:
            return None
        for path in sorted(self.directory.glob(f"{_digest(question)}-*.npz")):
            found = load(path)
            if found is not None and set(bases) <= set(found.bases):
                return found
        return None

    def put(self, question: TokenizedQuestion, item: Trace) -> None:
        """Store `item`. Raises OSError."""
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        bases = hashlib.sha256(repr(sorted(item.bases)).encode()).hexdigest()[:8]
        save(self.directory / f"{_digest(question)}-{bases}.npz", item)


def traces(
    questions: Sequence[TokenizedQuestion],
    bases: Sequence[float],
    store: TraceStore,
    open_engine: Callable[[], Engine],
    *,
    last_alone: bool = False,
) -> Iterator[Trace]:
    """The trace of every question, from `store` or else from an engine, which is opened when it is first needed.

    The engine is the caller's to close; its slot 0 is used. `last_alone` is that of `abcli.evals.traces.trace`.
    Raises what tracing raises, and OSError of the store.
    """
    engine: Engine | None = None
    for question in questions:
        found = store.get(question, bases)
        if found is None:
            engine = engine or open_engine()
            found = trace(engine, 0, question.prompt, question.continuations, last_alone)
            store.put(question, found)
        yield found


def _digest(question: TokenizedQuestion) -> str:
    text = repr((question.prompt, question.continuations))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
