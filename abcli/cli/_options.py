"""The flags that commands share, each declared once, with llama.cpp's names where llama.cpp has them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from abcli.chat.files import decode_prompt, read_text_file
from abcli.cli._flags import flag
from abcli.cli._lora import LoraFlag, parse_loras
from abcli.cli._model_name import ModelNameOptions
from abcli.config import (
    DEFAULT_BUCKETS,
    DEFAULT_CONTEXT,
    MAX_BUCKETS,
    BucketConfig,
    CacheType,
    ContextConfig,
    EngineChoice,
    FlashAttention,
    MergeRule,
    ModelConfig,
    PrefillMode,
    Spread,
    prompt_cache_directory,
)
from abcli.errors import PromptError, UsageError
from abcli.hub.locate import BundledName, locate_model
from abcli.hub.names import HubName
from abcli.prepare import check_context, check_gpu_layers
from abcli.profiles.profile import NO_PROFILE, check_name
from abcli.rope.bases import asked_buckets, parse_numbers
from abcli.sampling import (
    DEFAULT_DRY_BREAKERS,
    SETTINGS,
    GateSetting,
    GenerationConfig,
    SamplingConfig,
    SamplingNumbers,
    parse_gate,
    parse_lookup,
)
from abcli.text import unescaped
from abcli.ui.terminal import Terminal

_CONTEXT = ContextConfig()
_MODEL = ModelConfig(Path())
_BUCKETS = BucketConfig()
_ANSWER = GenerationConfig()


@dataclass(frozen=True)
class RunningOptions:
    """How llama.cpp runs a model."""

    panel: ClassVar[str] = "Model"

    lora: LoraFlag = None
    ctx_size: Annotated[int, flag("Tokens the context holds; 0: the trained length.", "--ctx-size", "-c")] = (
        DEFAULT_CONTEXT
    )
    batch_size: Annotated[int, flag("Most tokens handed to llama.cpp at once.", "--batch-size", "-b")] = (
        _CONTEXT.batch_size
    )
    ubatch_size: Annotated[int, flag("Most tokens computed at once.", "--ubatch-size", "-ub")] = _CONTEXT.ubatch_size
    threads: Annotated[int, flag("Threads for all buckets together; 0: one per core.", "--threads", "-t")] = (
        _CONTEXT.threads
    )
    gpu_layers: Annotated[int, flag("Layers on the GPU, if the build has one; -1: all.", "--gpu-layers", "-ngl")] = (
        _MODEL.gpu_layers
    )
    flash_attn: Annotated[FlashAttention, flag("Flash attention.", "--flash-attn", "-fa")] = _CONTEXT.flash_attention
    cache_type_k: Annotated[CacheType, flag("Type of the key cache.", "--cache-type-k", "-ctk")] = _CONTEXT.cache_type_k
    cache_type_v: Annotated[CacheType, flag("Type of the value cache.", "--cache-type-v", "-ctv")] = (
        _CONTEXT.cache_type_v
    )
    prefill: Annotated[
        PrefillMode | None,
        flag(
            "shared: one bucket computes the prompt for all; exact: each its own; auto: by length.",
            "--prefill",
            show_default="auto",
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
    ] = _CONTEXT.engine
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

    def config_of(self, name: str | None) -> ModelConfig:
        """The model of a name, None: the default one; what is not here is fetched.

        Raises UsageError for impossible numbers, ModelFileError if it is nowhere, DownloadError if fetching fails.
        """
        # What is wrong with the flags is said before a model is fetched.
        self.context_config()
        check_gpu_layers(self.gpu_layers)
        path = locate_model(name, _fetch)
        return ModelConfig(path, self.gpu_layers, parse_loras(self.lora))

    def context_config(self) -> ContextConfig:
        """How the model is run. Raises UsageError for impossible numbers."""
        context = ContextConfig(
            context_size=self.ctx_size,
            batch_size=self.batch_size,
            ubatch_size=self.ubatch_size,
            threads=self.threads,
            flash_attention=self.flash_attn,
            cache_type_k=self.cache_type_k,
            cache_type_v=self.cache_type_v,
            prefill=self.prefill,
            engine=self.engine,
            force=self.force,
            prompt_cache=self.prompt_cache_dir or (prompt_cache_directory() if self.prompt_cache else None),
        )
        check_context(context)
        return context


@dataclass(frozen=True)
class ModelOptions(RunningOptions, ModelNameOptions):
    """Which model, and how llama.cpp runs it."""

    def model_config(self, positional: str | None) -> ModelConfig:
        """The model; `positional` is the one given without a flag. Raises as `config_of`, and UsageError for two."""
        return self.config_of(self.name(positional))


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
        return asked_buckets(
            self.buckets,
            parse_numbers(self.bases, "--bases") if self.bases is not None else (),
            parse_numbers(self.multipliers, "--multipliers") if self.multipliers is not None else (),
            self.spread,
            self.merge,
            parse_numbers(self.weights, "--weights") if self.weights is not None else (),
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
    gate: Annotated[
        str,
        flag(
            "One bucket decides alone where its likeliest token is more likely than this; auto: than 0.9, where "
            "that saves time; off: all are asked.",
            "--gate",
            metavar="auto|off|SHARE",
        ),
    ] = "off"

    def threshold(self) -> GateSetting:
        """The gate, None for none. Raises UsageError."""
        return parse_gate(self.gate)

    def config(self) -> BucketConfig:
        """The bucket settings without the profile's. Raises UsageError for contradictions and impossible numbers."""
        if self.profile is not None and self.profile != NO_PROFILE:
            check_name(self.profile)
            if (flag_given := self.given()) is not None:
                raise UsageError(f"--profile {self.profile} and {flag_given} are both given", "give one of them")
        return super().config()


@dataclass(frozen=True)
class SamplingOptions(SamplingNumbers):
    """llama.cpp's samplers, in llama.cpp's words."""

    panel: ClassVar[str] = "Sampling"

    dry_sequence_breaker: Annotated[
        list[str] | None,
        flag(
            "Text that ends a DRY repetition; repeatable, replaces the defaults.",
            "--dry-sequence-breaker",
        ),
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        flag(
            "TOKEN+BIAS or TOKEN-BIAS, e.g. 15043-inf; repeatable.",
            "--logit-bias",
        ),
    ] = None
    json_schema: Annotated[str, flag("JSON schema the answer must follow.", "--json-schema", "-j", metavar="JSON")] = ""
    json_schema_file: Annotated[Path | None, flag("The same from a file.", "--json-schema-file")] = None
    schema_lenient: Annotated[
        bool, flag("Leave out what cannot be enforced of a schema, and say so.", "--schema-lenient")
    ] = False
    regex: Annotated[str, flag("Regular expression for the whole answer.", "--regex", metavar="PATTERN")] = ""
    lark: Annotated[str, flag("Lark grammar the answer must follow.", "--lark", metavar="LARK")] = ""
    lark_file: Annotated[Path | None, flag("The same from a file.", "--lark-file")] = None
    grammar: Annotated[str, flag("GBNF grammar the answer must follow.", "--grammar", metavar="GBNF")] = ""
    grammar_file: Annotated[Path | None, flag("The same from a file.", "--grammar-file")] = None

    def config(self) -> SamplingConfig:
        """The sampler's settings; files are read. Raises UsageError and PromptError (unreadable files)."""
        grammar = _text_or_file(self.grammar, self.grammar_file, "--grammar")
        schema = _text_or_file(self.json_schema, self.json_schema_file, "--json-schema")
        breakers = self.dry_sequence_breaker
        return SamplingConfig(
            **{name: getattr(self, name) for name in SETTINGS},
            dry_breakers=tuple(breakers) if breakers else DEFAULT_DRY_BREAKERS,
            logit_bias=tuple(parse_logit_bias(text) for text in self.logit_bias or ()),
            grammar=grammar,
            json_schema=schema,
            regex=self.regex,
            lark=_text_or_file(self.lark, self.lark_file, "--lark"),
            schema_lenient=self.schema_lenient,
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
    lookup: Annotated[
        str,
        flag(
            "Guess what the answer repeats of prompt and answer, and check several tokens at once: auto, off, or "
            "up to so many tokens.",
            "--lookup",
            metavar="auto|off|N",
        ),
    ] = "off"
    escape: Annotated[
        bool | None,
        flag(
            r"Read \n, \r, \t, \', \", \\ and \xHH in texts on the command line.",
            "--escape/--no-escape",
            "-e",
            show_default="in --stop and --dry-sequence-breaker only",
        ),
    ] = None

    def config(self, sampling: SamplingConfig, gate: GateSetting = None) -> GenerationConfig:
        """How to generate one answer. Raises UsageError."""
        if self.predict < -1:
            raise UsageError(f"--predict {self.predict} is impossible", "choose 0 or more, or -1")
        stops, breakers = tuple(self.stop or ()), sampling.dry_breakers
        if self.escape is not False:
            stops = tuple(read_escapes(text, "--stop") for text in stops)
            breakers = tuple(read_escapes(text, "--dry-sequence-breaker") for text in breakers)
        base = GenerationConfig(replace(sampling, dry_breakers=breakers), self.predict, stops)
        return replace(base, ignore_eos=self.ignore_eos, gate=gate, lookup=parse_lookup(self.lookup))

    def text(self, text: str, what: str) -> str:
        """A prompt from the command line. Raises PromptError."""
        return read_escapes(check_argument(text, what), what) if self.escape else check_argument(text, what)


def _fetch(name: HubName | BundledName) -> Path:
    # What fetches is imported where something is to be fetched.
    from abcli.ui.download import fetch_shown

    return fetch_shown(Terminal(), name)


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
