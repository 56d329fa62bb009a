"""Counters as Prometheus reads them, with llama-server's names after the prefix."""

from __future__ import annotations

from abcli.serve.worker import Worker

_PREFIX = "abcli"


def metrics_text(worker: Worker) -> str:
    """All counters and gauges."""
    counts = worker.counts
    computed = counts.prompt_tokens - counts.cached_tokens
    found = (
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
    lines = []
    for name, kind, text, value in found:
        full = f"{_PREFIX}:{name}"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}", f"{full} {value:.10g}"]
    return "\n".join(lines) + "\n"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
