"""A sound profile to begin with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from abcli.profiles.profile import Difference, Everyday, Evidence, Profile, Score

FINGERPRINT = "0123456789abcdef" * 4
OTHER_FINGERPRINT = "fedcba9876543210" * 4

SAMPLE = Profile(
    name="needle-1024",
    fingerprint=FINGERPRINT,
    model="model.gguf",
    architecture="llama",
    native_base=100_000.0,
    bases=(50_000.0, 100_000.0, 150_000.0),
    merge="mean",
    weights=(),
    prefill="shared",
    prefill_base=50_000.0,
    task="needle",
    length=1024,
    created="2025-01-02T03:04:05+00:00",
    abcli_version="0.1.0",
    evidence=Evidence(
        questions=200,
        configuration="calibrated",
        scores=(
            Score("native", 0.5, 0.34, 0.9),
            Score("spread6", 0.45, 0.36, 0.8, Difference(-0.05, -0.07, -0.03)),
            Score("calibrated", 0.375, 0.42, 0.6, Difference(-0.125, -0.15, -0.1)),
        ),
    ),
)


EVERYDAY = Everyday(
    text_tokens=1234,
    native_loss=3.0,
    tuned_loss=3.01,
    prompts=50,
    equal=20,
    native_repeating=2,
    tuned_repeating=0,
)


def profile(name: str = SAMPLE.name, **changes: Any) -> Profile:
    """The sample under another name or with other values."""
    return replace(SAMPLE, name=name, **changes)
