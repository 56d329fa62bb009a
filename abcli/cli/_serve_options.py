"""The flags of `abcli serve` alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from abcli.chat.files import read_text_file
from abcli.chat.options import ChatOptions, ReasoningFormat, Thinking, chat_options
from abcli.cli._flags import flag
from abcli.cli._options import check_argument
from abcli.errors import UsageError
from abcli.sampling import GateSetting, GenerationConfig, SamplingConfig, SamplingNumbers

if TYPE_CHECKING:
    # An extra may be missing.
    from abcli.serve.guard import Access
    from abcli.serve.service import Settings

_CHAT = ChatOptions()
_ANSWER = GenerationConfig()
_LOOPBACK = "127.0.0.1"
_SHORTEST_KEY = 8


@dataclass(frozen=True)
class AddressOptions:
    """Where the server listens, and who may ask."""

    panel: ClassVar[str] = "Address and access"

    host: Annotated[str, flag("Address to listen at.", "--host")] = _LOOPBACK
    port: Annotated[int, flag("Port to listen at; 0: any that is free.", "--port", min=0, max=65535)] = 8080
    api_key: Annotated[
        list[str] | None,
        flag("Key that requests must have; repeatable.", "--api-key", envvar="ABCLI_API_KEY"),
    ] = None
    api_key_file: Annotated[Path | None, flag("File with a key on each line.", "--api-key-file")] = None
    allow_anyone: Annotated[
        bool,
        flag("Let everybody who reaches another address than this machine's own ask without a key.", "--allow-anyone"),
    ] = False
    allowed_host: Annotated[
        list[str] | None,
        flag("Name that the server goes by, beside addresses and localhost; repeatable; *: any.", "--allowed-host"),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        flag("Origin of web pages that may ask, beside localhost's; repeatable; *: any.", "--cors-origin"),
    ] = None

    def access(self) -> Access:
        """Which hosts and origins are let in."""
        from abcli.serve.guard import Access

        return Access((*(self.allowed_host or ()), self.host), tuple(self.cors_origin or ()))

    def keys(self) -> tuple[str, ...]:
        """The keys, none if everybody may ask. Raises UsageError and PromptError."""
        from abcli.serve.guard import is_loopback

        found = [check_argument(key, "--api-key") for key in self.api_key or ()]
        if self.api_key_file is not None:
            found += [line.strip() for line in read_text_file(self.api_key_file).splitlines() if line.strip()]
            if not found:
                raise UsageError(f"{self.api_key_file} has no key", "write one on each line")
        for key in found:
            if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or key != key.strip():
                raise UsageError(
                    "an API key is not possible",
                    f"use at least {_SHORTEST_KEY} letters, digits and signs, without spaces around them",
                )
        if not (is_loopback(self.host) or found or self.allow_anyone):
            raise UsageError(
                f"--host {self.host} lets other machines ask",
                "give --api-key or --api-key-file, or --allow-anyone if that is meant",
            )
        return tuple(found)


@dataclass(frozen=True)
class ServingOptions:
    """How many are served at once, and how long."""

    panel: ClassVar[str] = "Serving"

    parallel: Annotated[
        str, flag("Requests answered at once, or auto: as memory allows.", "--parallel", "-np", metavar="N")
    ] = "auto"
    queue: Annotated[int, flag("Requests that may wait for that; more are refused (429).", "--queue", min=0)] = 64
    timeout: Annotated[float, flag("Most seconds that a request may take.", "--timeout", min=1.0)] = 600.0
    sse_ping: Annotated[
        float, flag("Seconds after which a silent stream gets a comment; 0: never.", "--sse-ping", min=0.0)
    ] = 15.0
    slots: Annotated[bool, flag("Tell at /slots what is being done.", "--slots/--no-slots")] = True
    metrics: Annotated[bool, flag("Tell counters at /metrics.", "--metrics/--no-metrics")] = True
    log_requests: Annotated[
        bool, flag("A line on standard error for each request, without its text.", "--log-requests/--no-log-requests")
    ] = True

    def settings(self, generation: GenerationConfig, options: ChatOptions) -> Settings:
        """How to serve; requests that leave them open get `generation` and `options`."""
        from abcli.serve.service import Settings

        return Settings(
            alias="",
            generation=generation,
            options=options,
            queue=self.queue,
            seconds=self.timeout,
            ping_seconds=self.sse_ping,
            show_slots=self.slots,
            show_metrics=self.metrics,
        )

    def wanted_slots(self) -> int | None:
        """The number of slots, None for auto. Raises UsageError."""
        if self.parallel == "auto":
            return None
        if not self.parallel.isdecimal():
            raise UsageError(f"--parallel {self.parallel!r:.40} is impossible", "give a number, or auto")
        return int(self.parallel)


@dataclass(frozen=True)
class UsualSampling(SamplingNumbers):
    """llama.cpp's samplers, for requests that leave them open."""

    panel: ClassVar[str] = "Sampling, where requests leave it open"

    predict: Annotated[int, flag("Most new tokens; -1: until the context is full.", "--predict", "-n", min=-1)] = (
        _ANSWER.max_tokens
    )

    def config(self, gate: GateSetting) -> GenerationConfig:
        """How to answer what leaves everything open."""
        numbers = {name: getattr(self, name) for name in SamplingNumbers.__dataclass_fields__}
        return GenerationConfig(SamplingConfig(**numbers), self.predict, gate=gate)


@dataclass(frozen=True)
class UsualThoughts:
    """What chat templates are told where requests leave it open."""

    panel: ClassVar[str] = "Thoughts, where requests leave it open"

    thinking: Annotated[
        Thinking, flag("Whether the model thinks first, where its template leaves that open.", "--thinking")
    ] = _CHAT.thinking
    thinking_budget: Annotated[
        int, flag("Most tokens of a thought; -1: no limit.", "--thinking-budget", "--reasoning-budget")
    ] = _CHAT.thinking_budget
    reasoning_format: Annotated[
        ReasoningFormat,
        flag("Where thoughts go: apart (auto, deepseek), left in the text (none), or both.", "--reasoning-format"),
    ] = _CHAT.reasoning_format
    chat_template_kwargs: Annotated[
        str, flag("Variables for the chat template, as a JSON object.", "--chat-template-kwargs", metavar="JSON")
    ] = _CHAT.chat_template_kwargs

    def options(self) -> ChatOptions:
        """The options. Raises UsageError."""
        return chat_options(
            {
                "thinking": self.thinking,
                "thinking_budget": self.thinking_budget,
                "reasoning_format": self.reasoning_format,
                "chat_template_kwargs": check_argument(self.chat_template_kwargs, "--chat-template-kwargs"),
            }
        )
