"""From the fields of a request to how its answer is decoded: OpenAI's names and llama-server's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from abcli.chat.response_format import response_schema
from abcli.config import MERGE_RULES
from abcli.errors import UsageError
from abcli.profiles.profile import NO_PROFILE
from abcli.sampling import NATIVE_RANDOM_SEED, SETTINGS, GenerationConfig, SamplingConfig, as_float, generation_config
from abcli.serve.fields import Fields
from abcli.serve.problems import blaming
from abcli.serve.service import Service, Wanted

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1_000
MAX_BIASES = 1_024
MAX_TOP_LOGPROBS = 20
MAX_CONSTRAINT_CHARACTERS = 512 * 1024
_CONSTRAINTS = ("grammar", "json_schema", "response_format")
_LIMITS = ("max_completion_tokens", "max_tokens", "n_predict")


def read_generation(fields: Fields, service: Service) -> GenerationConfig:
    """How to decode, from the sampling fields of a request on top of the server's. Raises UsageError."""
    base = service.settings.generation
    numbers = {name: fields.any(name) for name in SETTINGS if name in fields}
    if (penalty := fields.any("repetition_penalty")) is not None:
        numbers.setdefault("repeat_penalty", penalty)
    if "seed" in numbers:
        numbers["seed"] = _seed(fields)
    if "dry_sequence_breakers" in fields:
        numbers["dry_breakers"] = fields.texts("dry_sequence_breakers", MAX_STOPS)
    if "logit_bias" in fields:
        numbers["logit_bias"] = _biases(fields, service)
    if "ignore_eos" in fields:
        numbers["ignore_eos"] = fields.flag("ignore_eos")
    if "stop" in fields:
        numbers["stop"] = _stops(fields)
    limit = fields.present(*_LIMITS)
    if limit in fields:
        numbers["max_tokens"] = fields.whole(limit, -1, -1, 2**31 - 1)
    config = generation_config(generation=base, **numbers)
    config = replace(config, sampling=_constrained(fields, config.sampling))
    return _with_buckets(fields, service, config)


def check_constraint(fields: Fields, service: Service, sampling: SamplingConfig) -> None:
    """Compile what an answer has to follow, so that the thread that computes need not. Raises UsageError."""
    with blaming(fields.present(*_CONSTRAINTS, "tools")):
        service.llm.check(sampling)


def with_seed(config: GenerationConfig, number: int) -> GenerationConfig:
    """The same for a request's choice of that number: a seed that is given is another one for each."""
    sampling = config.sampling
    if sampling.seed < 0 or number == 0:
        return config
    return replace(config, sampling=replace(sampling, seed=(sampling.seed + number) % NATIVE_RANDOM_SEED))


def _seed(fields: Fields) -> int:
    """A seed; OpenAI's have 64 bits, llama.cpp's 32."""
    seed = fields.whole("seed", -1, -(2**63), 2**64 - 1)
    return seed if seed == -1 else seed % NATIVE_RANDOM_SEED


def _stops(fields: Fields) -> tuple[str, ...]:
    stops = fields.texts("stop", MAX_STOPS)
    if any(len(text) > MAX_STOP_CHARACTERS for text in stops):
        raise UsageError("a text in 'stop' is too long", f"use at most {MAX_STOP_CHARACTERS}", setting="stop")
    return stops


def _biases(fields: Fields, service: Service) -> tuple[tuple[int, float], ...]:
    """OpenAI's object {"TOKEN": BIAS}, or llama-server's list [[TOKEN or TEXT, BIAS or false], ...]."""
    value = fields.any("logit_bias")
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    wanted = 'an object {"TOKEN": BIAS} or a list [[TOKEN or TEXT, BIAS], ...]'
    if not isinstance(pairs, list) or len(pairs) > MAX_BIASES:
        raise fields.wrong("logit_bias", f"{wanted} of at most {MAX_BIASES}")
    found: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise fields.wrong("logit_bias", wanted)
        token, bias = pair
        if bias is False:
            bias = -math.inf
        if type(bias) not in (int, float):
            raise fields.wrong("logit_bias", wanted)
        if isinstance(token, str) and not token.removeprefix("-").isdecimal():
            tokens = service.llm.tokenize(token, add_special=False)
        elif isinstance(token, str) or type(token) is int:
            tokens = [int(token)]
        else:
            raise fields.wrong("logit_bias", wanted)
        found.update(dict.fromkeys(tokens, as_float(bias)))
    return tuple(found.items())


def _constrained(fields: Fields, sampling: SamplingConfig) -> SamplingConfig:
    """The sampling with what the answer has to follow."""
    found: dict[str, Any] = {}
    for name in _CONSTRAINTS:
        if name in fields:
            with blaming(name):
                found = {**_constraint(fields, name), **found}
    for name, text in found.items():
        if isinstance(text, str) and len(text) > MAX_CONSTRAINT_CHARACTERS:
            raise UsageError(
                f"'{name}' is too long", f"use at most {MAX_CONSTRAINT_CHARACTERS:,} characters", setting=name
            )
    return replace(sampling, **found)


def _constraint(fields: Fields, name: str) -> dict[str, Any]:
    if name == "grammar":
        return {"grammar": text} if (text := fields.text("grammar")) else {}
    if name == "json_schema":
        return _schema(fields.any("json_schema"), lenient=True)
    strict = fields.inner("response_format").inner("json_schema").flag("strict")
    schema = response_schema(fields.any("response_format"))
    return {} if schema is None else _schema(schema, lenient=not strict)


def _schema(schema: Any, *, lenient: bool) -> dict[str, Any]:
    if not isinstance(schema, dict | bool | str):
        raise UsageError("the schema is no JSON schema", "make it an object")
    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    return {"json_schema": text, "schema_lenient": lenient}


def _with_buckets(fields: Fields, service: Service, config: GenerationConfig) -> GenerationConfig:
    """The configuration with what the field `abcli` says of the buckets, as far as this server can do so."""
    own, llm = fields.inner("abcli"), service.llm
    if "gate" in own:
        with blaming("abcli.gate"):
            config = generation_config(generation=config, gate=own.any("gate"))
    count = len(llm.bases)
    if "buckets" in own:
        buckets = own.whole("buckets", count, 1, 2**31 - 1)
        if buckets not in (1, count):
            raise UsageError(
                f"'abcli.buckets' is {buckets}, but this server has {count}",
                f"ask for 1 or {count}, or start another server",
                setting="abcli.buckets",
            )
        if buckets == 1 < count:
            # The native bucket decides everything alone.
            config = replace(config, gate=0.0)
    if "profile" in own:
        used = service.llm.profile.name if service.llm.profile is not None else NO_PROFILE
        if own.text("profile") != used:
            raise UsageError(
                f"'abcli.profile' is not what this server uses: {used}",
                "leave it out, or start another server",
                setting="abcli.profile",
            )
    if "merge" in own:
        merge = own.word("merge", MERGE_RULES, llm.buckets.merge)
        config = replace(config, merge=next(rule for rule in MERGE_RULES if rule == merge))
    return config


def read_wanted(fields: Fields) -> Wanted:
    """What a request wants beside the text and log-probabilities. Raises UsageError."""
    timings, progress = fields.flag("timings_per_token"), fields.flag("return_progress")
    streams = fields.flag("stream")
    return Wanted(
        fresh=not fields.flag("cache_prompt", default=True),
        timings=streams and timings,
        progress=streams and progress,
    )


def read_chat_wanted(fields: Fields) -> Wanted:
    """The same with the log-probabilities that a chat request wants. Raises UsageError."""
    top: int | None = None
    if fields.flag("logprobs"):
        top = fields.whole("top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    elif fields.any("top_logprobs"):
        raise UsageError("'top_logprobs' needs logprobs", "set 'logprobs' to true", setting="top_logprobs")
    elif "n_probs" in fields:
        top = fields.whole("n_probs", 0, 0, MAX_TOP_LOGPROBS) or None
    return replace(read_wanted(fields), top=top, each_bucket=fields.inner("abcli").flag("show_buckets"))
