"""Finding out how a model writes calls and thoughts, from what its chat template writes for them."""

from __future__ import annotations

import re
from dataclasses import replace

from abcli.chat.calls.differences import first_tag, last_tag, tags
from abcli.chat.calls.find_calls import find_calls
from abcli.chat.calls.format import HERMES, CallFormat, Thoughts
from abcli.chat.calls.known_formats import KNOWN_FORMATS
from abcli.chat.calls.probes import ANSWER, THOUGHT, Probes, Render

_THOUGHT_TAG = r"<[^<>\s]*(?:think|channel)[^<>\s]*>"
_EMPTY_THOUGHT = re.compile(rf"({_THOUGHT_TAG}\w*)\s*({_THOUGHT_TAG})\s*\Z", re.IGNORECASE)
# Spoken of in the system message.
_MISTRAL = Thoughts("[THINK]", "[/THINK]")


def find_format(render: Render) -> CallFormat:
    """The format that a template writes, or the Hermes models' as a fallback for a template that shows none."""
    probes = Probes(render)
    thoughts = _thoughts(probes)
    known = next((form for text, form in KNOWN_FORMATS.items() if text in probes.everything), None)
    if known is not None:
        return known if known.channels else replace(known, thoughts=thoughts)
    framing = _framing(probes, thoughts)
    found = find_calls(probes, (thoughts.begin, thoughts.end, *framing)) or replace(HERMES, fallback=True)
    return replace(found, thoughts=thoughts, framing=framing)


def _thoughts(probes: Probes) -> Thoughts:
    """What is around a thought in an answer; what is left of it where none is wanted; or what most models write."""
    before, thought, after = probes.answer(reasoning_content=THOUGHT).partition(THOUGHT)
    end = first_tag(after)
    if thought and end and (begin := _beginning(probes, before)):
        return Thoughts(begin, end)
    prompts = [probes.prompt(enable_thinking=False), probes.prompt(enable_thinking=True), probes.prompt()]
    for prompt in prompts:
        if empty := _EMPTY_THOUGHT.search(prompt):
            return Thoughts(empty.group(1), empty.group(2))
    return _MISTRAL if _MISTRAL.begin in probes.everything else Thoughts()


def _beginning(probes: Probes, before: str) -> str:
    """What begins the thought behind a text, empty if that is nothing but what any answer has before it."""
    begin = last_tag(before)
    if begin and begin != last_tag(probes.answer().partition(ANSWER)[0]):
        return begin
    # Only the prompt has it: a tag of its own, or words on the last line.
    prompt = probes.prompt().rstrip()
    tag = last_tag(prompt)
    line = prompt.rpartition("\n")[2]
    return tag if tag and tag not in before else line if line and not tags(line) else ""


def _framing(probes: Probes, thoughts: Thoughts) -> tuple[str, ...]:
    """The markers around what is said."""
    before, _, after = probes.answer().partition(ANSWER)
    begin = last_tag(before)
    if not begin or begin in (thoughts.begin, thoughts.end) or begin in probes.prompt():
        return ()
    return tuple(dict.fromkeys((begin, *tags(after))))
