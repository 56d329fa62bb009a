"""Counters as Prometheus reads them, with llama-server's names after the prefix."""

from __future__ import annotations

from collections.abc import Mapping

from abcli.serve.events import to_json
from abcli.serve.worker import Worker

_PREFIX = "abcli"


def metrics_text(workers: Mapping[str, Worker], *, named: bool = False) -> str:
    """All counters and gauges of the workers of some models, with the models' names if there can be several."""
    labels = ["{model=" + to_json(model) + "}" if named else "" for model in workers]
    lines = []
    for each in zip(*map(_found, workers.values()), strict=True):
        name, kind, text, _value = each[0]
        full = f"{_PREFIX}:{name}"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
        lines += [f"{full}{label} {item[3]:.10g}" for label, item in zip(labels, each, strict=True)]
    return "\n".join(lines) + "\n"


def _found(worker: Worker) -> tuple[tuple[str, str, str, float], ...]:
    """(name, kind, what it is, value) of each."""
    counts = worker.counts
    computed = counts.prompt_tokens - counts.cached_tokens
    return (
        ("prompt_tokens_total", "counter", "Prompt tokens computed.", computed),
        ("prompt_tokens_cached_total", "counter", "Prompt tokens that were there already.", counts.cached_tokens),
        ("prompt_seconds_total", "counter", "Time that prompts took.", counts.prefill_seconds),
        ("tokens_predicted_total", "counter", "Tokens of answers.", counts.completion_tokens),
        ("tokens_predicted_seconds_total", "counter", "Time that answers took.", counts.decode_seconds),
        ("answers_total", "counter", "Answers that came to their end.", counts.answers),
        ("errors_total", "counter", "Answers that failed.", counts.errors),
        ("given_up_total", "counter", "Answers that nobody waited for.", counts.given_up),
        ("n_decode_total", "counter", "Steps of the decoder.", counts.steps),
        ("n_busy_slots_per_decode", "gauge", "Slots busy in a step, on average.", _ratio(counts.busy, counts.steps)),
        (
            "prompt_tokens_seconds",
            "gauge",
            "Prompt tokens per second, on average.",
            _ratio(computed, counts.prefill_seconds),
        ),
        (
            "predicted_tokens_seconds",
            "gauge",
            "Tokens of an answer per second, on average.",
            _ratio(counts.completion_tokens, counts.decode_seconds),
        ),
        ("requests_processing", "gauge", "Answers in progress.", len(worker.running)),
        ("requests_deferred", "gauge", "Answers that wait for a slot.", worker.waiting),
        (
            "agreement",
            "gauge",
            "Probability mass on which the buckets agree, on average.",
            _ratio(counts.agreement_sum, counts.asked_steps),
        ),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
