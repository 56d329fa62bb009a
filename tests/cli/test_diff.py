"""`abcli diff`: answers side by side, and where they part."""

from __future__ import annotations

import json
from pathlib import Path

from abcli.config import profiles_directory
from abcli.gguf.check import check_file
from abcli.gguf.fingerprint import fingerprint
from abcli.profiles.store import save
from tests.cli.conftest import Command
from tests.profiles.samples import profile

ASKED = ("tell me about the hill " * 4, "-n", 12, "--temp", 0, "-c", 256)


def test_answers_are_those_of_run_and_part_where_they_differ(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("diff", tiny_model, *ASKED, "--json")
    assert (outcome.code, outcome.errors) == (0, b"")
    single, usual = json.loads(outcome.output)["answers"]
    assert (single["buckets"], usual["buckets"]) == (1, 6)
    for answer, count in ((single, 1), (usual, 6)):
        run = json.loads(abcli("run", tiny_model, *ASKED, "-k", count, "--json").output)
        assert answer["text"].startswith(run["text"])
    place = usual["parts_at"]
    assert place is not None
    assert single["tokens"][:place] == usual["tokens"][:place]
    assert single["tokens"][place] != usual["tokens"][place]
    shown = abcli("diff", tiny_model, *ASKED).text
    assert f"default parts from one bucket at token {place + 1}:" in shown
    assert f"one bucket {single['probabilities'][place]:.1%}" in shown
    assert shown.count("»") >= 2


def test_the_same_answer_is_called_so(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("diff", tiny_model, "hello", "-n", 1, "--temp", 0, "-c", 256, "--logit-bias", "65+1000")
    assert "default: the same answer" in outcome.text


def test_no_token_is_nothing_to_compare(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("diff", tiny_model, "hello", "-n", 0, "-c", 256)
    assert outcome.code == 0
    assert "the same answer" in outcome.text


def test_a_profile_is_the_third_answer(tiny_model: Path, abcli: Command) -> None:
    identity = fingerprint(check_file(tiny_model))
    made = profile("mine", fingerprint=identity, model=tiny_model.name, native_base=10_000.0)
    save(made, profiles_directory())
    answers = json.loads(abcli("diff", tiny_model, *ASKED, "--json").output)["answers"]
    assert [(answer["name"], answer["buckets"]) for answer in answers] == [
        ("one bucket", 1),
        ("default", 6),
        ("profile mine", 3),
    ]
    assert "profile mine (3 buckets)" in abcli("diff", tiny_model, *ASKED).text
