"""One message of a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Message:
    """Who says what; `content` is plain text, in which control tokens mean nothing."""

    role: Role
    content: str
