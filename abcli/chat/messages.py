"""One message of a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Message:
    """Who says what; control tokens in it mean nothing. `reasoning_content` is the thought before an answer."""

    role: Role
    content: str
    reasoning_content: str = ""
