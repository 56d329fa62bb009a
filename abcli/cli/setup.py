"""What `run` and `chat` do before the first prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from abcli.cli.options import ModelOptions, ProfiledBucketOptions
from abcli.config import BucketConfig, EngineConfig, profiles_directory
from abcli.engine.opening import Opened, open_engine
from abcli.errors import ProfileError
from abcli.generate import Generator
from abcli.gguf.fingerprint import fingerprint
from abcli.gguf.lora import check_model
from abcli.native.llama import echo_log
from abcli.native.sampler import SamplerChain
from abcli.profiles.lookup import default_profile, may_have_profile, named_profile
from abcli.profiles.profile import NO_PROFILE, Profile
from abcli.text import counted
from abcli.ui.terminal import Terminal, one_line


@dataclass(frozen=True)
class Ready:
    """A loaded model and the loop that decodes with it."""

    opened: Opened
    generator: Generator
    buckets: BucketConfig


@contextmanager
def ready(terminal: Terminal, config: EngineConfig, buckets: BucketConfig, *, verbose: bool = False) -> Iterator[Ready]:
    """Load the model with a spinner, say what --verbose asks for, and free everything after the block."""
    if verbose:
        echo_log(sys.stderr.write)
    with ExitStack() as stack:
        with terminal.working(f"loading {config.model.name}") as say:
            opened = stack.enter_context(open_engine(config, buckets, terminal.warn, say))
        engine, model = opened.engine, opened.model
        if engine.context_size > model.trained_context:
            terminal.warn(
                f"a context of {engine.context_size} tokens is longer than the {model.trained_context} "
                "the model was trained with"
            )
        if verbose:
            bases = ", ".join(f"{base:g}" for base in engine.bases)
            terminal.note(f"{model.description}; bases {bases}; merge {buckets.merge}; {engine.sharing}")
            terminal.note(f"engine {opened.engine_choice.kind}: {opened.engine_choice.reason}")
        if config.prefill == "shared" and len(engine.bases) > 1 and not engine.sharing.shared:
            terminal.warn(f"--prefill shared is not possible: {engine.sharing}")
        make_sampler = partial(SamplerChain, model, context_size=engine.context_size)
        generator = stack.enter_context(Generator(engine, model, make_sampler, buckets.merge, buckets.weights))
        yield Ready(opened, generator, buckets)


def resolve_profile(
    terminal: Terminal, positional: str | None, model_options: ModelOptions, bucket_options: ProfiledBucketOptions
) -> tuple[EngineConfig, BucketConfig]:
    """The settings to load a model with: those of the flags, and of the model's profile if one is to be used.

    `positional` is the model given without a flag. Without --profile it is the model's default profile, if it has one
    and no flag says which buckets to use; what is wrong with it is a warning. A note says which profile is used.
    Raises UsageError for flags that contradict each other, ProfileError for a profile asked for by name that is
    missing or damaged, and ModelFileError and UnsupportedModelError as opening the model would.
    """
    buckets = bucket_options.config()
    engine = model_options.engine_config(positional)
    name = bucket_options.profile
    if name == NO_PROFILE or (name is None and bucket_options.given() is not None):
        return engine, buckets
    if name is not None:
        header = check_model(engine.model, engine.lora)
        profile: Profile | None = named_profile(profiles_directory(), fingerprint(header), name, header.name)
    else:
        profile = _default_profile(engine, terminal)
    if profile is None:
        return engine, buckets
    bases = " ".join(f"{base:g}" for base in profile.bases)
    count = counted(len(profile.bases), "bucket")
    terminal.note(
        f"profile {profile.name}: {count} {bases} merge {profile.merge} "
        f"(calibrated on {one_line(profile.task)}; --profile {NO_PROFILE} to do without)"
    )
    engine = replace(
        engine,
        prefill=model_options.prefill or profile.prefill,
        prefill_base=profile.prefill_base if engine.prefill_base is None else engine.prefill_base,
    )
    return engine, BucketConfig(
        count=len(profile.bases), bases=profile.bases, merge=profile.merge, weights=profile.weights
    )


def _default_profile(engine: EngineConfig, terminal: Terminal) -> Profile | None:
    """The model's default profile; damage is a warning."""
    directory = profiles_directory()
    try:
        if not may_have_profile(directory, _size(engine.model)):
            return None
        return default_profile(directory, fingerprint(check_model(engine.model, engine.lora)), terminal.warn)
    except ProfileError as error:
        terminal.warn(f"{error.message}; no profile is used")
        return None


def _size(path: Path) -> int:
    """The bytes of a file; -1 for one that opening the model will complain about."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1
