"""Scores against what the model really says: an answer is exact if, and only if, greedy decoding gives it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest

from abcli.config import Buckets, ContextConfig
from abcli.evals.configurations import Configuration, parse_configuration
from abcli.evals.model_under_test import Subject
from abcli.evals.prompts import TokenizedQuestion
from abcli.evals.runner import EvaluationSettings, make_questions
from abcli.evals.scores import Score
from abcli.evals.scoring import score
from abcli.generate import Generator, common_prefix
from abcli.native.sampler import SamplerChain
from abcli.profiles.profile import Profile
from abcli.sampling import GenerationConfig, SamplingConfig
from tests.support.engines import contexts_engine
from tests.support.models import checked_model
from tests.support.tiny_gguf import write_tiny_model

COMPARED = ("native", "spread3", "spread3;merge=mean", "spread3;merge=pool;weights=1.4,-0.6,0.2")
NO_LIMIT = 10_000


def no_profile(_name: str | None) -> Profile:
    raise AssertionError("no profile is asked for")


@pytest.fixture(scope="module")
def real_subject(real_model: Path) -> Iterator[Subject]:
    # One thread: how many there are decides about the last bits, and they follow the number of buckets.
    with Subject(checked_model(real_model), ContextConfig(threads=1)) as opened:
        yield opened


@pytest.fixture(scope="module")
def tiny_subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    path = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", seed=3)
    with Subject(checked_model(path), ContextConfig(threads=1, cache_type_k="f32", cache_type_v="f32")) as opened:
        yield opened


def configurations(subject: Subject) -> list[Configuration]:
    return [parse_configuration(text, subject.native_base, no_profile) for text in COMPARED]


def greedy_answers(
    subject: Subject,
    bases: Sequence[float],
    rules: Sequence[Configuration],
    questions: Sequence[TokenizedQuestion],
    *,
    stop_early: bool,
) -> list[list[list[int]]]:
    """For each of `rules`, which all have `bases`, and each question: the tokens that are generated.

    There are as many as in the answer; with `stop_early` none after the first wrong one.
    """
    model = subject.model
    config = replace(subject.config, context_size=2048, prefill="shared")
    buckets = Buckets(tuple(bases), subject.native_base)
    greedy = GenerationConfig(SamplingConfig(seed=1, temperature=0.0))

    def make_sampler(sampling: SamplingConfig) -> SamplerChain:
        return SamplerChain(model, sampling)

    answers: list[list[list[int]]] = [[] for _ in rules]
    with contexts_engine(model, config, buckets) as engine:
        generators = [Generator(engine, model, make_sampler, item.merge, item.weights) for item in rules]
        for question in questions:
            if len(bases) == 1:
                # As among others: what is computed in one batch decides about the last bits.
                cached = engine.truncate(0, min(common_prefix(engine.tokens(0), question.prompt), NO_LIMIT))
                engine.prefill(0, question.prompt[cached:-1])
            for generator, of_rule in zip(generators, answers, strict=True):
                answer, found = question.continuations[0], []
                for piece in generator.stream(0, question.prompt, replace(greedy, max_tokens=len(answer))):
                    found = piece.answer.tokens
                    if stop_early and tuple(found) != answer[: len(found)]:
                        break
                of_rule.append(found)
        for generator in generators:
            generator.close()
    return answers


def check_exactness(subject: Subject, questions: Sequence[TokenizedQuestion]) -> dict[str, list[Score]]:
    """Compare the scores with greedy decoding; the scores by configuration."""
    compared = configurations(subject)
    bases = sorted({base for item in compared for base in item.bases})
    traces = subject.trace(questions, bases, subject.prefill("auto", None))
    scores = {item.name: [score(trace, item) for trace in traces] for item in compared}
    for group in ([item for item in compared if len(item.bases) == count] for count in (1, 3)):
        generated = greedy_answers(subject, group[0].bases, group, questions, stop_early=True)
        for item, answers in zip(group, generated, strict=True):
            right = [
                tuple(tokens) == question.continuations[0] for tokens, question in zip(answers, questions, strict=True)
            ]
            assert [found.exact for found in scores[item.name]] == right, item.name
    return scores


def test_exact_is_what_greedy_decoding_gives_on_a_real_model(real_subject: Subject) -> None:
    settings = EvaluationSettings("needle", (300,), limit=6)
    # The model fails at some of these, and not at the same ones under all configurations.
    made = make_questions(settings, real_subject)[2:4]
    scores = check_exactness(real_subject, [real_subject.prompts.tokenize(question) for question in made])
    assert {found.exact for of in scores.values() for found in of} == {True, False}
    assert len({tuple(found.nll for found in of) for of in scores.values()}) == len(COMPARED)


def short_questions(subject: Subject, count: int) -> list[TokenizedQuestion]:
    """Questions on a few contexts; their answers are what one configuration or another decodes greedily."""
    words = ("the", "net", "runs", "on", "into", "a", "tone", "of", "sand", "and", "then", "it", "was", "not", "so")
    prompts = []
    for number in range(count):
        context = " ".join(words[(number // 5 + 3 * place) % len(words)] for place in range(12))
        text = f"{context}? {number} {words[number % len(words)]}"
        prompts.append(tuple(subject.model.tokenize(text, add_special=True, parse_special=False)))
    asked = [TokenizedQuestion(prompt, ((1, 2, 3),)) for prompt in prompts]
    compared = configurations(subject)
    answers = [
        greedy_answers(subject, item.bases, [item], asked, stop_early=False)[0] for item in (compared[0], compared[3])
    ]
    return [
        TokenizedQuestion(prompt, (tuple(answers[number % 2][number]),))
        for number, prompt in enumerate(prompts)
        if answers[number % 2][number]
    ]


def test_exact_is_what_greedy_decoding_gives_on_random_weights(tiny_subject: Subject) -> None:
    questions = short_questions(tiny_subject, 60)
    assert len(questions) > 50
    scores = check_exactness(tiny_subject, questions)
    for name, of in scores.items():
        assert {found.exact for found in of} == {True, False}, name


def test_the_native_base_is_llama_cpp_itself(tiny_subject: Subject) -> None:
    """The library's own loop, with its own model and context, gives the answers that are scored as exact."""
    questions = short_questions(tiny_subject, 20)
    item = configurations(tiny_subject)[0]
    traces = tiny_subject.trace(questions, item.bases, tiny_subject.prefill("auto", None))
    model = llama_cpp.Llama(
        str(tiny_subject.checked.path),
        n_ctx=512,
        n_threads=1,
        n_threads_batch=1,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    try:
        outcomes = set()
        for question, trace in zip(questions, traces, strict=True):
            (answer,) = question.continuations
            model.reset()
            tokens = model.generate(list(question.prompt), temp=0.0, repeat_penalty=1.0)
            right = tuple(token for token, _ in zip(tokens, answer, strict=False)) == answer
            outcomes.add(right)
            assert score(trace, item).exact == right
        assert outcomes == {True, False}
    finally:
        model.close()
