"""What look-up drafts cost and save in time: answers with `lookup="auto"` and without, side by side in one process.

Two prompts ask for a text with a few words changed, the others for prose. Both settings take turns, one answer after
the other, greedily and with the same number of tokens. Printed are for each prompt the median of the ratios of the
times per token after the first, within a turn (above 1: drafts save time), how many of the looked-up tokens were right,
and whether the answers are equal.
"""

from __future__ import annotations

import argparse
import inspect
from statistics import median

import abcli
from abcli import lookup

EDIT = (
    "Write this file again, word for word, with the name `Budget` changed to `Account`.\n\n```python\n"
    + inspect.getsource(lookup.Budget)
    + "```"
)
CORRECT = """Correct the spelling mistakes in this text and repeat all of it:

The old lighthous stood on the northern cliff, where the wind never rested. Every evening the keeper climbed the one \
hundred and forty steps, trimmed the lamp and wrote the wether into his book. In the winter of 1911 a schooner from \
Bergen ran aground below the cliff, and the keeper, his wife and their two sons pulled eleven men from the water \
before the mast broke. Nobody in the village forgot that night, and the names of the eleven are cut into the stone \
beside the door.
"""
PROMPTS = (
    ("code", EDIT),
    ("text", CORRECT),
    ("prose", "Write a short story about a lighthouse keeper and a storm."),
    ("prose", "Explain to a child how a volcano comes to be, in three paragraphs."),
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--buckets", type=int, default=1)
    parser.add_argument("--gate", type=float, help="with several buckets")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    usual = {"profile": "none", "ctx_size": 2048, "buckets": chosen.buckets, "gate": chosen.gate}
    with abcli.load(chosen.model, **usual) as llm:
        for name, prompt in PROMPTS:
            ratios, guessed, equal = [], 0.0, True
            for turn in range(chosen.rounds):
                answers = {}
                for setting in (None, "auto") if turn % 2 == 0 else ("auto", None):
                    settings = {"temp": 0, "ignore_eos": True, "lookup": setting}
                    llm.generate(prompt, max_tokens=1, **settings)
                    *_, last = llm.stream(prompt, max_tokens=chosen.tokens, **settings)
                    assert last.running is not None
                    answers[setting] = last.running
                plain, drafted = answers[None], answers["auto"]
                ratios.append(plain.statistics.decode_seconds / drafted.statistics.decode_seconds)
                guessed = drafted.statistics.guessed_tokens / max(1, drafted.statistics.drafted_tokens)
                equal = equal and plain.tokens == drafted.tokens
            print(
                f"{name:6} {median(ratios):5.2f}x  {min(ratios):.2f} to {max(ratios):.2f}"
                f"  {guessed:.0%} of the drafts right  answers {'equal' if equal else 'different'}"
            )


if __name__ == "__main__":
    main()
