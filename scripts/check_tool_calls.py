"""Read the fixtures of canitoolcall with the formats of the public templates, and print what passes per family.

`pip install canitoolcall` first (dev extra), and fetch the templates. A fixture is read as the engines of its published
matrix read theirs: at once and in pieces of one and of several tokens. Twice is counted: with the calls that an answer
has at its end, and with what a client has that adds up every piece of a call as it comes, those of a call that is cut
off later included.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from canitoolcall.checks import case_status, run_checks
from canitoolcall.fixtures import Fixture, load_families, load_fixtures
from canitoolcall.results import Observation, ParsedToolCall, ParseResult, Status

from abcli.chat.calls.events import ArgumentsText, CallBegun, ContentText, Event, ThoughtText
from abcli.chat.calls.format import CallFormat
from abcli.chat.calls.parser import AnswerParser
from abcli.chat.calls.rendering import format_of_source
from abcli.chat.messages import Tool
from scripts.fetch_public_templates import directory

# The public template of each reference model, or of one that writes the same; DeepSeek V4.1 and Llama 4 have none.
TEMPLATES = {
    "deepseek-ai/DeepSeek-V3-0324": "llama-cpp-deepseek-r1",
    "deepseek-ai/DeepSeek-V3.1": "deepseek-ai-DeepSeek-V3.1",
    "deepseek-ai/DeepSeek-V3.2": "deepseek-ai-DeepSeek-V3.2",
    "deepseek-ai/DeepSeek-V4-Flash": "deepseek-ai-DeepSeek-V4",
    "google/gemma-4-31B-it": "google-gemma-4-31B-it",
    "zai-org/GLM-4.5": "GLM-4.6",
    "zai-org/GLM-4.7": "GLM-4.7-Flash",
    "zai-org/GLM-5.3": "GLM-4.7-Flash",
    "openai/gpt-oss-20b": "openai-gpt-oss-120b",
    "openai/gpt-oss-120b": "openai-gpt-oss-120b",
    "moonshotai/Kimi-K2.6": "Kimi-K2-Thinking",
    "moonshotai/Kimi-K2-Instruct-0905": "Kimi-K2-Instruct",
    "moonshotai/Kimi-K3": "Kimi-K3",
    "meta-llama/Llama-3.3-70B-Instruct": "meta-llama-Llama-3.3-70B-Instruct",
    "mistralai/Magistral-Small-2509": "mistralai-Ministral-3-14B-Reasoning-2512",
    "mistralai/Ministral-3-14B-Reasoning-2512": "mistralai-Ministral-3-14B-Reasoning-2512",
    "mistralai/Mistral-Small-4-119B-2603": "mistralai-Ministral-3-14B-Reasoning-2512",
    "mistralai/Mistral-Medium-3.5-128B": "mistralai-Ministral-3-14B-Reasoning-2512",
    "mistralai/Ministral-3-14B-Instruct-2512": "mistralai-Ministral-3-14B-Reasoning-2512",
    "mistralai/Devstral-Small-2-24B-Instruct-2512": "unsloth-mistral-Devstral-Small-2507",
    "mistralai/Devstral-Small-2507": "unsloth-mistral-Devstral-Small-2507",
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": "Mistral-Small-3.2-24B-Instruct-2506",
    "mistralai/Magistral-Small-2506": "Mistral-Small-3.2-24B-Instruct-2506",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistralai-Mistral-Nemo-Instruct-2407",
    "Qwen/Qwen3-0.6B": "Qwen-Qwen3-0.6B",
    "Qwen/Qwen3-4B-Thinking-2507": "Qwen-Qwen3-0.6B",
    "Qwen/Qwen3-4B-Instruct-2507": "Qwen-Qwen3-0.6B",
    "Qwen/Qwen3.8-27B": "Qwen3.5-4B",
    "Qwen/Qwen3.6-35B-A3B": "Qwen3.5-4B",
    "Qwen/Qwen3.5-9B": "Qwen3.5-4B",
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": "Qwen3-Coder",
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": "Qwen3-Coder",
    "Qwen/Qwen3-Coder-Next": "Qwen3-Coder",
}


def formats() -> dict[str, CallFormat]:
    """The format of each reference model that has a public template."""
    names = sorted(set(TEMPLATES.values()))
    found = {name: format_of_source((directory() / f"{name}.jinja").read_text("utf-8")) for name in names}
    return {model: found[name] for model, name in TEMPLATES.items()}


def tools_of(fixture: Fixture) -> list[Tool]:
    """The tools that a fixture offers."""
    functions = [tool["function"] for tool in fixture.tools]
    return [Tool(item["name"], item.get("description", ""), item.get("parameters") or {}) for item in functions]


def pieces(text: str, seed: int) -> list[str]:
    """The text in pieces as tokens might have it, special tokens whole."""
    chooser, found = random.Random(seed), []
    while text:
        length = chooser.randint(1, 4 if seed < 3 else 24)
        found.append(text[:length])
        text = text[length:]
    return found


def read(form: CallFormat, fixture: Fixture, prompt: str, text: Iterable[str], *, as_they_come: bool) -> ParseResult:
    """What an answer in pieces to a prompt is read as."""
    parser = AnswerParser(
        form, tools_of(fixture), thought_opened=bool(form.thoughts and form.thoughts.opened_by(prompt))
    )
    events: list[Event] = []
    for piece in text:
        events += parser.feed(piece)
    events += parser.finish(cut="truncated" in fixture.tags)
    said = "".join(event.text for event in events if isinstance(event, ContentText))
    thought = "".join(event.text for event in events if isinstance(event, ThoughtText))
    calls = [ParsedToolCall(call.name, call.arguments) for call in parser.calls]
    if as_they_come:
        calls = pieces_of_calls(events)
    return ParseResult(said or None, thought or None, tuple(calls))


def pieces_of_calls(events: Iterable[Event]) -> list[ParsedToolCall]:
    """The calls that a client has which adds up what comes."""
    calls: dict[int, list[str]] = {}
    for event in events:
        if isinstance(event, CallBegun):
            calls.setdefault(event.index, ["", ""])[0] += event.name
        elif isinstance(event, ArgumentsText):
            calls[event.index][1] += event.text
    return [ParsedToolCall(name, arguments) for _, (name, arguments) in sorted(calls.items())]


@dataclass
class Outcome:
    """How a fixture fares, and the first thing that is wrong."""

    fixture: Fixture
    status: Status
    streamed: Status
    detail: str = ""


def outcomes(models: Mapping[str, CallFormat], fixtures: Iterable[Fixture]) -> list[Outcome]:
    """How the fixtures of models with a format fare."""
    families = load_families()
    found = []
    for fixture in fixtures:
        form = models.get(fixture.models[0])
        if form is None:
            continue
        reference = families[fixture.family].reference_for(fixture.models[0])
        prompt = fixture.generation_prompt or (reference and reference.default_generation_prompt) or ""
        statuses, detail = [], ""
        for as_they_come in (False, True):
            whole = read(form, fixture, prompt, [fixture.raw_output], as_they_come=False)
            streams = {
                f"rand:{seed}:8": read(
                    form, fixture, prompt, pieces(fixture.raw_output, seed), as_they_come=as_they_come
                )
                for seed in range(1, 6)
            }
            rows = run_checks(fixture, families[fixture.family], Observation(whole, streams))
            statuses.append(case_status(rows))
            if not detail:
                detail = next((row.detail or row.check for row in rows if row.status is Status.FAIL), "")
        found.append(Outcome(fixture, statuses[0], statuses[1], detail))
    return found


def main() -> None:
    """Print the table, then what failed where `-v` is given, and the sums as JSON."""
    found = outcomes(formats(), load_fixtures())
    sums: dict[str, Counter[str]] = {}
    for outcome in found:
        sums.setdefault(outcome.fixture.family, Counter())["total"] += 1
        sums[outcome.fixture.family][outcome.status.value] += 1
        sums[outcome.fixture.family]["streamed"] += outcome.streamed is Status.PASS
        if "-v" in sys.argv and outcome.status is not Status.PASS:
            print(outcome.fixture.id, outcome.status.value, outcome.detail)
    print("| Family | passed | white space | failed | of | as they come |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    everything: Counter[str] = Counter()
    for counts in sums.values():
        everything += counts
    for family, counts in [*sums.items(), ("all", everything)]:
        columns = (counts[name] for name in ("pass", "soft_pass", "fail", "total", "streamed"))
        print(f"| {family} | {' | '.join(map(str, columns))} |")
    print(json.dumps({family: dict(counts) for family, counts in sums.items()}))


if __name__ == "__main__":
    main()
