"""What commands that generate do before the first prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from abcli.cli._options import ModelOptions, ProfiledBucketOptions, RunningOptions
from abcli.config import ModelConfig
from abcli.llm import LLM
from abcli.machine import log_to
from abcli.prepare import AUTO_PROFILE, Prepared, prepare
from abcli.profiles.profile import NO_PROFILE
from abcli.text import counted
from abcli.ui.terminal import Terminal, one_line


def prepared(
    terminal: Terminal, positional: str | None, model_options: ModelOptions, bucket_options: ProfiledBucketOptions
) -> Prepared:
    """As `prepared_model`, for the model of the flags; `positional` is the one given without a flag."""
    bucket_options.config()
    return prepared_model(terminal, model_options.model_config(positional), model_options, bucket_options)


def prepared_model(
    terminal: Terminal, model: ModelConfig, model_options: RunningOptions, bucket_options: ProfiledBucketOptions
) -> Prepared:
    """A model, checked, with the settings of the flags, and of its profile if one is to be used; a note says so.

    Raises UsageError for flags that contradict each other, and what `prepare` raises.
    """
    asked = bucket_options.config()
    found = prepare(
        model,
        replace(
            model_options.context_config(),
            gated="auto" if (gate := bucket_options.threshold()) == "auto" else gate is not None,
        ),
        asked if bucket_options.given() is not None else None,
        prefill_base=model_options.prefill_base,
        profile=bucket_options.profile or AUTO_PROFILE,
        warn=terminal.warn,
    )
    profile = found.profile
    if profile is not None:
        bases = " ".join(f"{base:g}" for base in profile.bases)
        count = counted(len(profile.bases), "bucket")
        how = f"merge {profile.merge} (calibrated on"
        kinds = {"gains": profile.gains, "bases": profile.head_multipliers}
        tuned = [f"{kind} of {sum(map(len, numbers)):,} heads" for kind, numbers in kinds.items() if numbers]
        if tuned:
            how = f"with {' and '.join(tuned)} (tuned on"
        terminal.note(
            f"profile {profile.name}: {count} {bases} {how} {one_line(profile.task)}; "
            f"--profile {NO_PROFILE} to do without)"
        )
    return found


@contextmanager
def opened(terminal: Terminal, found: Prepared, options: RunningOptions) -> Iterator[LLM]:
    """Load the model with a spinner, say what --verbose asks for, and free everything after the block."""
    if options.verbose:
        log_to(sys.stderr.write)
    with terminal.working(f"loading {found.model.path.name}") as say:
        llm = LLM(found, chat_template=options.chat_template, warn=terminal.warn, say=say)
    with llm:
        trained = found.model.header.trained_context
        if llm.context_size > trained:
            terminal.warn(
                f"a context of {llm.context_size} tokens is longer than the {trained} the model was trained with"
            )
        if options.verbose:
            bases = ", ".join(f"{base:g}" for base in llm.bases)
            terminal.note(f"{llm.description}; bases {bases}; merge {llm.buckets.merge}; {llm.engine.sharing}")
            turning = f"; {llm.engine.turning}" if llm.engine.turning else ""
            terminal.note(f"engine {llm.engine_choice.kind}: {llm.engine_choice.reason}{turning}")
        if found.context.prefill == "shared" and len(llm.bases) > 1 and not llm.shares_prefill:
            terminal.warn(f"--prefill shared is not possible: {llm.engine.sharing}")
        yield llm
