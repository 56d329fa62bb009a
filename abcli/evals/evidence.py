"""From what an evaluation came to, to the profile that keeps it."""

from __future__ import annotations

from abcli.evals.model_under_test import Subject
from abcli.evals.statistics import NATIVE, Summary
from abcli.profiles.profile import Difference, Evidence, Profile, Score, utc_now
from abcli.version import __version__


def evidence(summary: Summary, name: str) -> Score:
    """What a profile keeps of a configuration, under `name`."""
    difference = None
    if summary.difference is not None and summary.configuration != NATIVE:
        nll = summary.difference.nll
        difference = Difference(nll.value, nll.low, nll.high)
    measures = summary.measures
    return Score(name, measures.nll.value, measures.accuracy.value, measures.worst_nll.value, difference)


def untuned_profile(name: str, subject: Subject, task: str, length: int, evidence: Evidence) -> Profile:
    """A profile called `name`, made now, that leaves the model as it is: one bucket of its own base.

    `length` is that of the contexts, in tokens, on which the evidence was found.
    """
    return Profile(
        name=name,
        fingerprint=subject.checked.fingerprint,
        model=subject.checked.name,
        architecture=subject.checked.header.architecture,
        native_base=subject.native_base,
        bases=(subject.native_base,),
        merge="confidence",
        weights=(),
        prefill="auto",
        prefill_base=None,
        task=task,
        length=length,
        created=utc_now(),
        abcli_version=__version__,
        evidence=evidence,
    )
