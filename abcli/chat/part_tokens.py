"""The tokens of a rendered conversation, in which only chosen control tokens count as such."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from abcli.chat.control_text import Marks
from abcli.errors import PromptError
from abcli.native.model import Model

# llama_token_attr bits; white space before or after a token that strips belongs to it.
_CONTROL = 1 << 3
_BYTE = 1 << 5
_STRIPS_LEFT = 1 << 7
_STRIPS_RIGHT = 1 << 8
_WHITE_SPACE = " \t\n\v\f\r"


class PartTokenizer:
    """Tokenizes a text that is split at its control tokens, as llama.cpp does after it has split one."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def plain(self, rendered: str) -> list[int]:
        """The tokens of a text in which every control token counts, beginning-of-sequence added where it is wanted."""
        bos = self._model.bos_text
        lacks_start = not (bos and rendered.startswith(bos))
        return self._model.tokenize(rendered, add_special=lacks_start, parse_special=True)

    def of_parts(self, parts: Sequence[str | int], marks: Marks) -> list[int]:
        """The tokens of control tokens and the texts between them, whose marks are taken out. Raises PromptError."""
        model = self._model
        tokens: list[int] = []
        for index, part in enumerate(parts):
            if isinstance(part, int):
                tokens.append(part)
                continue
            text = marks.remove(part)
            before, after = parts[index - 1 : index], parts[index + 1 : index + 2]
            if before and isinstance(before[0], int) and model.attributes(before[0]) & _STRIPS_RIGHT:
                text = text.lstrip(_WHITE_SPACE)
            if after and isinstance(after[0], int) and model.attributes(after[0]) & _STRIPS_LEFT:
                text = text.rstrip(_WHITE_SPACE)
            tokens += self.text(text)
        first = parts[0] if parts else None
        if isinstance(first, int) and first == model.control_tokens.get(model.bos_text):
            return tokens
        start, end = self._ends
        return [*start, *tokens, *end]

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """What the model's tokenizer adds before and after a text."""
        body = self._model.tokenize("a", add_special=False, parse_special=False)
        whole = self._model.tokenize("a", add_special=True, parse_special=False)
        start = next(at for at in range(len(whole)) if whole[at : at + len(body)] == body)
        return whole[:start], whole[start + len(body) :]

    def text(self, text: str) -> list[int]:
        """The tokens of plain text. Raises PromptError if it cannot be written without a control token."""
        model = self._model
        tokens = []
        for token in model.tokenize(text, add_special=False, parse_special=False) if text else []:
            # SentencePiece may merge letters into a control token even so; single bytes say the same.
            spelled = model.piece(token, special=True) if model.attributes(token) & _CONTROL else b""
            if not all(byte in self._byte_tokens for byte in spelled):
                raise PromptError(
                    f"this tokenizer cannot write {spelled.decode('utf-8', 'replace')!r} as text", "leave it out"
                )
            tokens += [self._byte_tokens[byte] for byte in spelled] if spelled else [token]
        return tokens

    @cached_property
    def _byte_tokens(self) -> dict[int, int]:
        """Byte -> the token that stands for it alone, where the vocabulary has such tokens."""
        model = self._model
        found = (token for token in range(model.vocabulary_size) if model.attributes(token) & _BYTE)
        return {model.piece(token)[0]: token for token in found}
