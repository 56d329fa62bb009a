"""What a tuned profile leaves as it was, in words."""

from __future__ import annotations

from abcli.profiles.profile import Everyday
from abcli.text import counted


def everyday_lines(found: Everyday) -> list[tuple[str, str]]:
    """What becomes of plain text and of everyday prompts, each with a label."""
    before, after = found.native_loss, found.tuned_loss
    return [
        ("plain text", f"NLL {before:.3f} to {after:.3f}, {counted(found.text_tokens, 'token')}"),
        (
            "everyday",
            f"{found.equal} of {counted(found.prompts, 'answer')} are the same; {found.native_repeating} repeated "
            f"themselves, {found.tuned_repeating} do now",
        ),
    ]
