"""What the reuse rule is for: a prompt's logits do not depend on whose beginning it took over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from abcli.batch.slots import reuse_rule
from abcli.config import BucketConfig, ContextConfig, ModelConfig, PrefillMode
from abcli.engine.engine import MIN_SHARED_TOKENS
from abcli.llm import LLM
from abcli.prepare import prepare

DOCUMENT = [index * 37 % 250 for index in range(100)]
QUESTION = list(range(5, 15))
OTHER_QUESTION = [99, 98, 97]


@pytest.mark.parametrize(("prefill", "least"), [("auto", MIN_SHARED_TOKENS), ("shared", 2), ("exact", 1)])
def test_a_prompt_has_the_same_logits_whatever_ran_before(tiny_model: Path, prefill: PrefillMode, least: int) -> None:
    prompt = DOCUMENT + QUESTION
    context = ContextConfig(context_size=256, slots=2, threads=1, prefill=prefill)
    with LLM(prepare(ModelConfig(tiny_model), context, BucketConfig(count=3))) as llm:
        engine = llm.engine
        rule = reuse_rule(llm)
        assert rule.least == least
        alone = engine.prefill(0, prompt).copy()
        engine.truncate(0, 0)
        engine.prefill(0, DOCUMENT + OTHER_QUESTION)

        def after(kept: int) -> float:
            """The largest difference if `kept` tokens are taken over."""
            engine.copy(0, 1)
            engine.truncate(1, kept)
            return float(np.abs(engine.prefill(1, prompt[kept:]) - alone).max())

        usable = rule.usable(DOCUMENT + OTHER_QUESTION, prompt)
        assert usable == min(len(DOCUMENT), len(prompt) - least)
        assert after(usable) < 0.02
        if prefill == "auto":
            # All that is held: the rest is so short that each bucket would compute its own.
            assert after(len(DOCUMENT)) > 0.2


def test_one_bucket_takes_over_all_it_can(tiny_model: Path) -> None:
    context = ContextConfig(context_size=256, threads=1)
    with LLM(prepare(ModelConfig(tiny_model), context, BucketConfig(count=1))) as llm:
        assert reuse_rule(llm).least == 1
