"""The flags that commands share, each declared once, with llama.cpp's names where llama.cpp has them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

from abcli.chat.files import decode_prompt, read_text_file
from abcli.cli.flags import flag
from abcli.cli.lora import LoraFlag, parse_loras
from abcli.cli.model_name import ModelNameOptions
from abcli.config import (
    DEFAULT_BUCKETS,
    DEFAULT_CONTEXT,
    DEFAULT_DRY_BREAKERS,
    MAX_BUCKETS,
    BucketConfig,
    CacheType,
    EngineChoice,
    EngineConfig,
    FlashAttention,
    GenerationConfig,
    MergeRule,
    PrefillMode,
    SamplingConfig,
    Spread,
    prompt_cache_directory,
)
from abcli.errors import PromptError, UsageError
from abcli.hub.locate import locate_model
from abcli.merge import check_pool_weights
from abcli.profiles.profile import NO_PROFILE, check_name
from abcli.rope.bases import parse_numbers
from abcli.text import unescaped
from abcli.ui.download import fetch_shown
from abcli.ui.terminal import Terminal

_ENGINE = EngineConfig(Path(), ())
_BUCKETS = BucketConfig()
_SAMPLING = SamplingConfig()
_ANSWER = GenerationConfig()
# llama.cpp reads a quantised value cache only in its flash attention.
_PLAIN_CACHE_TYPES = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class ModelOptions(ModelNameOptions):
    """Which model, and how llama.cpp runs it."""

    lora: LoraFlag = None
    ctx_size: Annotated[int, flag("Tokens the context holds; 0: the trained length.", "--ctx-size", "-c")] = (
        DEFAULT_CONTEXT
    )
    batch_size: Annotated[int, flag("Most tokens handed to llama.cpp at once.", "--batch-size", "-b")] = (
        _ENGINE.batch_size
    )
    ubatch_size: Annotated[int, flag("Most tokens computed at once.", "--ubatch-size", "-ub")] = _ENGINE.ubatch_size
    threads: Annotated[int, flag("Threads for all buckets together; 0: one per core.", "--threads", "-t")] = (
        _ENGINE.threads
    )
    gpu_layers: Annotated[int, flag("Layers on the GPU, if the build has one; -1: all.", "--gpu-layers", "-ngl")] = (
        _ENGINE.gpu_layers
    )
    flash_attn: Annotated[FlashAttention, flag("Flash attention.", "--flash-attn", "-fa")] = _ENGINE.flash_attention
    cache_type_k: Annotated[CacheType, flag("Type of the key cache.", "--cache-type-k", "-ctk")] = _ENGINE.cache_type_k
    cache_type_v: Annotated[CacheType, flag("Type of the value cache.", "--cache-type-v", "-ctv")] = (
        _ENGINE.cache_type_v
    )
    prefill: Annotated[
        PrefillMode | None,
        flag(
            "shared: one bucket computes the prompt for all; exact: each its own; auto: by length.",
            "--prefill",
            show_default=str(_ENGINE.prefill),
        ),
    ] = None
    prefill_base: Annotated[
        float | None,
        flag("RoPE base that computes a shared prefill.", "--prefill-base", show_default="the model's own"),
    ] = None
    engine: Annotated[
        EngineChoice,
        flag(
            "contexts: one per bucket; fused: all buckets in one batch; auto: the faster here, by measuring.",
            "--engine",
        ),
    ] = _ENGINE.engine
    force: Annotated[bool, flag("Load even what is predicted not to fit into memory.", "--force")] = False
    prompt_cache: Annotated[
        bool, flag("Keep the state of long prompts on disk (also --prompt-cache=DIR).", "--prompt-cache")
    ] = False
    prompt_cache_dir: Annotated[
        Path | None, flag("Where to keep it; implies --prompt-cache.", "--prompt-cache-dir")
    ] = None
    chat_template: Annotated[
        str | None,
        flag("Jinja file or known name, instead of the model's.", "--chat-template"),
    ] = None
    verbose: Annotated[bool, flag("Show llama.cpp's log and what is decided.", "--verbose", "-v")] = False

    def engine_config(self, positional: str | None) -> EngineConfig:
        """The engine's settings; `positional` is the model given without a flag.

        A model of the hub that is not here is fetched. Raises UsageError for impossible numbers or two models,
        ModelFileError if the model is nowhere, DownloadError if it cannot be fetched.
        """
        model = self.name(positional)
        for name, value, least in (
            ("--ctx-size", self.ctx_size, 0),
            ("--batch-size", self.batch_size, 1),
            ("--ubatch-size", self.ubatch_size, 1),
            ("--threads", self.threads, 0),
            ("--gpu-layers", self.gpu_layers, -1),
        ):
            if not least <= value < 2**31:
                raise UsageError(f"{name} {value} is impossible", f"choose {least} or more")
        if self.flash_attn == "off" and self.cache_type_v not in _PLAIN_CACHE_TYPES:
            raise UsageError(
                f"--cache-type-v {self.cache_type_v} needs flash attention", "drop --flash-attn off, or take f16"
            )
        return EngineConfig(
            model=locate_model(model, partial(fetch_shown, Terminal())),
            bases=(),
            context_size=self.ctx_size,
            batch_size=self.batch_size,
            ubatch_size=self.ubatch_size,
            threads=self.threads,
            gpu_layers=self.gpu_layers,
            flash_attention=self.flash_attn,
            cache_type_k=self.cache_type_k,
            cache_type_v=self.cache_type_v,
            prefill=self.prefill or _ENGINE.prefill,
            prefill_base=self.prefill_base,
            engine=self.engine,
            force=self.force,
            lora=parse_loras(self.lora),
            prompt_cache=self.prompt_cache_dir or (prompt_cache_directory() if self.prompt_cache else None),
        )


@dataclass(frozen=True)
class BucketOptions:
    """How many buckets, their bases, and how their distributions are merged."""

    panel: ClassVar[str] = "Buckets"

    buckets: Annotated[
        int | None,
        flag(
            f"Number of buckets, 1 to {MAX_BUCKETS}; 1 is plain llama.cpp.",
            "--buckets",
            "-k",
            show_default=str(DEFAULT_BUCKETS),
        ),
    ] = None
    bases: Annotated[str | None, flag("RoPE base of each bucket: 50000,100000,...", "--bases", metavar="LIST")] = None
    multipliers: Annotated[
        str | None,
        flag("The same as multiples of the model's base: 0.5,1,2", "--multipliers", metavar="LIST"),
    ] = None
    spread: Annotated[
        Spread | None,
        flag(
            "Bases around the model's own, or the paper's multiples.",
            "--spread",
            show_default=str(_BUCKETS.spread),
        ),
    ] = None
    merge: Annotated[
        MergeRule | None,
        flag("How the buckets' distributions become one.", "--merge", show_default=str(_BUCKETS.merge)),
    ] = None
    weights: Annotated[
        str | None,
        flag(
            "Weights of the buckets for --merge pool, with the sum 1; negative ones turn against a bucket.",
            "--weights",
            metavar="LIST",
            show_default="equal",
        ),
    ] = None

    def config(self) -> BucketConfig:
        """The bucket settings. Raises UsageError for contradictions and impossible numbers."""
        bases = parse_numbers(self.bases, "--bases") if self.bases is not None else ()
        multipliers = parse_numbers(self.multipliers, "--multipliers") if self.multipliers is not None else ()
        if bases and multipliers:
            raise UsageError("--bases and --multipliers are both given", "give one of them")
        explicit = len(bases or multipliers)
        if explicit and self.spread is not None:
            raise UsageError("--spread has no say over explicit bases", "drop one")
        if explicit and self.buckets is not None and self.buckets != explicit:
            raise UsageError(
                f"--buckets {self.buckets} contradicts the {explicit} bases that are given", "drop --buckets"
            )
        count = explicit or (DEFAULT_BUCKETS if self.buckets is None else self.buckets)
        if not 1 <= count <= MAX_BUCKETS:
            raise UsageError(f"{count} buckets are impossible", f"choose 1 to {MAX_BUCKETS}")
        weights = parse_numbers(self.weights, "--weights") if self.weights is not None else ()
        if weights and self.merge != "pool":
            raise UsageError("--weights needs --merge pool", "the other rules find the weights by themselves")
        check_pool_weights(weights, count)
        return BucketConfig(
            count=count,
            spread=self.spread or _BUCKETS.spread,
            bases=bases,
            multipliers=multipliers,
            merge=self.merge or _BUCKETS.merge,
            weights=weights,
        )

    def given(self) -> str | None:
        """One of the flags that decide about the buckets, as in "--buckets 3"; None if there is none."""
        flags = (
            ("--buckets", self.buckets),
            ("--bases", self.bases),
            ("--multipliers", self.multipliers),
            ("--spread", self.spread),
            ("--merge", self.merge),
            ("--weights", self.weights),
        )
        return next((f"{name} {value}" for name, value in flags if value is not None), None)


@dataclass(frozen=True)
class ProfiledBucketOptions(BucketOptions):
    """The same for commands that generate, which can take it all from a calibrated profile."""

    profile: Annotated[
        str | None,
        flag(
            "Calibrated profile of the model, or none.",
            "--profile",
            metavar="NAME",
            show_default="the model's default profile, unless flags say which buckets",
        ),
    ] = None

    def config(self) -> BucketConfig:
        """The bucket settings without the profile's. Raises UsageError for contradictions and impossible numbers."""
        if self.profile is not None and self.profile != NO_PROFILE:
            check_name(self.profile)
            if (flag_given := self.given()) is not None:
                raise UsageError(f"--profile {self.profile} and {flag_given} are both given", "give one of them")
        return super().config()


@dataclass(frozen=True)
class SamplingOptions:
    """llama.cpp's samplers, in llama.cpp's words."""

    panel: ClassVar[str] = "Sampling"

    seed: Annotated[int, flag("Random seed; -1: a new one each time.", "--seed", "-s")] = _SAMPLING.seed
    temp: Annotated[float, flag("Temperature; 0 takes the most likely token.", "--temp")] = _SAMPLING.temperature
    top_k: Annotated[int, flag("Keep the k most likely tokens; 0: all.", "--top-k")] = _SAMPLING.top_k
    top_p: Annotated[float, flag("Keep tokens up to this total probability.", "--top-p")] = _SAMPLING.top_p
    min_p: Annotated[float, flag("Drop tokens less likely than this share of the likeliest.", "--min-p")] = (
        _SAMPLING.min_p
    )
    typical: Annotated[float, flag("Locally typical sampling; 1: off.", "--typical")] = _SAMPLING.typical_p
    top_n_sigma: Annotated[
        float,
        flag("Keep logits this near the best; -1: off.", "--top-n-sigma"),
    ] = _SAMPLING.top_n_sigma
    xtc_probability: Annotated[float, flag("Chance to exclude the top choices (XTC); 0: off.", "--xtc-probability")] = (
        _SAMPLING.xtc_probability
    )
    xtc_threshold: Annotated[float, flag("Probability above which XTC excludes.", "--xtc-threshold")] = (
        _SAMPLING.xtc_threshold
    )
    dry_multiplier: Annotated[float, flag("Strength of the DRY repetition penalty; 0: off.", "--dry-multiplier")] = (
        _SAMPLING.dry_multiplier
    )
    dry_base: Annotated[float, flag("Growth of the DRY penalty per token.", "--dry-base")] = _SAMPLING.dry_base
    dry_allowed_length: Annotated[int, flag("Longest repetition DRY leaves alone.", "--dry-allowed-length")] = (
        _SAMPLING.dry_allowed_length
    )
    dry_penalty_last_n: Annotated[int, flag("Tokens DRY looks back; -1: the context.", "--dry-penalty-last-n")] = (
        _SAMPLING.dry_penalty_last_n
    )
    dry_sequence_breaker: Annotated[
        list[str] | None,
        flag(
            "Text that ends a DRY repetition; repeatable, replaces the defaults.",
            "--dry-sequence-breaker",
        ),
    ] = None
    repeat_last_n: Annotated[
        int, flag("Tokens the penalties look back; 0: none, -1: the context.", "--repeat-last-n")
    ] = _SAMPLING.repeat_last_n
    repeat_penalty: Annotated[float, flag("Divides the logits of repeated tokens; 1: off.", "--repeat-penalty")] = (
        _SAMPLING.repeat_penalty
    )
    frequency_penalty: Annotated[float, flag("Subtracted per repetition; 0: off.", "--frequency-penalty")] = (
        _SAMPLING.frequency_penalty
    )
    presence_penalty: Annotated[float, flag("Subtracted once if repeated; 0: off.", "--presence-penalty")] = (
        _SAMPLING.presence_penalty
    )
    mirostat: Annotated[int, flag("2: Mirostat 2.0 instead of truncation; 0: off.", "--mirostat")] = _SAMPLING.mirostat
    mirostat_ent: Annotated[float, flag("Mirostat's target entropy (tau).", "--mirostat-ent")] = _SAMPLING.mirostat_tau
    mirostat_lr: Annotated[float, flag("Mirostat's learning rate (eta).", "--mirostat-lr")] = _SAMPLING.mirostat_eta
    logit_bias: Annotated[
        list[str] | None,
        flag(
            "TOKEN+BIAS or TOKEN-BIAS, e.g. 15043-inf; repeatable.",
            "--logit-bias",
        ),
    ] = None
    grammar: Annotated[str, flag("GBNF grammar the answer must follow.", "--grammar", metavar="GBNF")] = (
        _SAMPLING.grammar
    )
    grammar_file: Annotated[Path | None, flag("The same from a file.", "--grammar-file")] = None
    json_schema: Annotated[str, flag("JSON schema the answer must follow.", "--json-schema", "-j", metavar="JSON")] = (
        _SAMPLING.json_schema
    )
    json_schema_file: Annotated[Path | None, flag("The same from a file.", "--json-schema-file")] = None

    def config(self) -> SamplingConfig:
        """The sampler's settings; files are read. Raises UsageError and PromptError (unreadable files)."""
        grammar = _text_or_file(self.grammar, self.grammar_file, "--grammar")
        schema = _text_or_file(self.json_schema, self.json_schema_file, "--json-schema")
        breakers = self.dry_sequence_breaker
        return SamplingConfig(
            seed=self.seed,
            temperature=self.temp,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical,
            top_n_sigma=self.top_n_sigma,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            dry_multiplier=self.dry_multiplier,
            dry_base=self.dry_base,
            dry_allowed_length=self.dry_allowed_length,
            dry_penalty_last_n=self.dry_penalty_last_n,
            dry_breakers=tuple(breakers) if breakers else DEFAULT_DRY_BREAKERS,
            repeat_last_n=self.repeat_last_n,
            repeat_penalty=self.repeat_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            mirostat=self.mirostat,
            mirostat_tau=self.mirostat_ent,
            mirostat_eta=self.mirostat_lr,
            logit_bias=tuple(parse_logit_bias(text) for text in self.logit_bias or ()),
            grammar=grammar,
            json_schema=schema,
        )


@dataclass(frozen=True)
class AnswerOptions:
    """Where an answer ends."""

    panel: ClassVar[str] = "Answer"

    predict: Annotated[int, flag("Most new tokens; -1: until the context is full.", "--predict", "-n")] = (
        _ANSWER.max_tokens
    )
    stop: Annotated[list[str] | None, flag("Text that ends the answer; repeatable.", "--stop", "-r")] = None
    ignore_eos: Annotated[bool, flag("Go on after the model ends its answer.", "--ignore-eos")] = False
    escape: Annotated[
        bool | None,
        flag(
            r"Read \n, \r, \t, \', \", \\ and \xHH in texts on the command line.",
            "--escape/--no-escape",
            "-e",
            show_default="in --stop and --dry-sequence-breaker only",
        ),
    ] = None

    def config(self, sampling: SamplingConfig) -> GenerationConfig:
        """How to generate one answer. Raises UsageError."""
        if self.predict < -1:
            raise UsageError(f"--predict {self.predict} is impossible", "choose 0 or more, or -1")
        stops, breakers = tuple(self.stop or ()), sampling.dry_breakers
        if self.escape is not False:
            stops = tuple(read_escapes(text, "--stop") for text in stops)
            breakers = tuple(read_escapes(text, "--dry-sequence-breaker") for text in breakers)
        base = GenerationConfig(replace(sampling, dry_breakers=breakers), self.predict, stops)
        return replace(base, ignore_eos=self.ignore_eos)

    def text(self, text: str, what: str) -> str:
        """A prompt from the command line. Raises PromptError."""
        return read_escapes(check_argument(text, what), what) if self.escape else check_argument(text, what)


def parse_logit_bias(text: str) -> tuple[int, float]:
    """llama.cpp's `TOKEN_ID(+/-)BIAS`, e.g. "15043+1.5" or "15043-inf". Raises UsageError."""
    for sign in ("+", "-"):
        token, found, bias = text.partition(sign)
        if found and token.strip().isdecimal():
            try:
                return int(token), float(sign + bias)
            except ValueError:
                break
    raise UsageError(f"--logit-bias {text!r} is not TOKEN+BIAS", "write it like 15043+1 or 15043-inf")


def check_argument(text: str, what: str) -> str:
    """`text` from the command line, where Python smuggles bytes that are not UTF-8 in as lone surrogates.

    Like the text of a file it may begin with a byte order mark, which is dropped. Raises PromptError.
    """
    try:
        return decode_prompt(text.encode("utf-8", "surrogateescape"), what)
    except (PromptError, UnicodeEncodeError) as error:
        message = error.message if isinstance(error, PromptError) else f"{what} is not UTF-8"
        raise PromptError(message, "check the terminal's encoding") from None


def read_escapes(text: str, what: str) -> str:
    """`text` with its escape sequences read. Raises PromptError."""
    try:
        return unescaped(text)
    except UnicodeDecodeError:
        raise PromptError(
            f"{what} {text!r:.100} is not UTF-8 after its escapes are read", "write \\xHH for each byte of UTF-8"
        ) from None


def _text_or_file(text: str, path: Path | None, flag: str) -> str:
    if path is None:
        return check_argument(text, flag)
    if text:
        raise UsageError(f"{flag} and {flag}-file are both given", "give one of them")
    return read_text_file(path)
