"""What an answer has to follow: one of a JSON schema, a regular expression, a Lark grammar or a GBNF grammar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from abcli.errors import UsageError
from abcli.sampling import SamplingConfig

Kind = Literal["grammar", "json_schema", "regex", "lark"]

KINDS: tuple[Kind, ...] = get_args(Kind)
NAMES: dict[Kind, str] = {
    "grammar": "a grammar",
    "json_schema": "a JSON schema",
    "regex": "a regular expression",
    "lark": "a Lark grammar",
}


@dataclass(frozen=True)
class Constraint:
    """A description of the answers that are allowed, not checked yet.

    `lenient` drops what cannot be enforced in a JSON schema, also in one within a Lark grammar, instead of refusing it.
    """

    kind: Kind
    text: str
    lenient: bool = False


def constraint_of(config: SamplingConfig) -> Constraint | None:
    """What the settings ask for, None where answers are free. Raises UsageError where they ask for two at once."""
    given = [kind for kind in KINDS if getattr(config, kind)]
    if len(given) > 1:
        first, second = (NAMES[kind] for kind in given[:2])
        raise UsageError(f"both {first} and {second} are given", "give only one of them")
    if not given:
        return None
    return Constraint(given[0], getattr(config, given[0]), config.schema_lenient)
