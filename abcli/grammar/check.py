"""Checks of what an answer has to follow, before any model is needed."""

from __future__ import annotations

from functools import lru_cache

from abcli.errors import AbcliError, GrammarError
from abcli.grammar.constraint import Constraint, constraint_of
from abcli.sampling import SamplingConfig

_KEPT = 64


def check(config: SamplingConfig) -> tuple[str, ...]:
    """Check the schema or grammar of the settings, if any; remarks on what of it is not enforced.

    Raises UsageError if there is more than one, GrammarError if the one there is cannot be used.
    """
    constraint = constraint_of(config)
    if constraint is None:
        return ()
    problem, remarks = _outcome(constraint)
    if problem is not None:
        raise GrammarError(*problem)
    return remarks


@lru_cache(_KEPT)
def _outcome(constraint: Constraint) -> tuple[tuple[str, str] | None, tuple[str, ...]]:
    """What is wrong and what to do, or the remarks; many lines of a batch have the same schema."""
    try:
        if constraint.kind == "grammar":
            from abcli.grammar import gbnf

            gbnf.check(constraint.text)
            return None, ()
        # Slow to import, and few have a schema.
        from abcli.grammar.guidance import compile_constraint

        return None, compile_constraint(constraint).remarks
    except AbcliError as error:
        return (error.message, error.hint), ()
