"""abcli: local language models whose attention overlooks nothing (Attention Buckets on llama.cpp).

`load` opens a model, which answers: see `LLM`. Every error is an `AbcliError`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from abcli.version import __version__

if TYPE_CHECKING:
    from abcli.chat.answer import Answer, Piece, Timings, Usage
    from abcli.chat.controller import Chat
    from abcli.chat.messages import Message, Tool, ToolCall
    from abcli.config import LoraConfig
    from abcli.engine.engine import Engine
    from abcli.errors import (
        AbcliError,
        BatchError,
        CancelledError,
        ContextFullError,
        DownloadError,
        EvaluationDataError,
        GrammarError,
        ModelFileError,
        NativeError,
        OutOfMemoryError,
        ProfileError,
        PromptError,
        SessionError,
        TemplateError,
        ToolServerError,
        UnsupportedModelError,
        UsageError,
    )
    from abcli.likelihood import TokenScore
    from abcli.llama import Llama
    from abcli.llm import LLM, load
    from abcli.merge import Merged, Merger
    from abcli.protocols import Sampler, Tokenizer
    from abcli.sampling import Choice, GenerationConfig, SamplingConfig
    from abcli.trace.page import save_trace
    from abcli.trace.trace import Trace

# Where each name comes from, imported when it is first used: the command line needs few of them.
_HOMES = {
    "abcli.chat.answer": ("Answer", "Piece", "Timings", "Usage"),
    "abcli.chat.controller": ("Chat",),
    "abcli.chat.messages": ("Message", "Tool", "ToolCall"),
    "abcli.config": ("LoraConfig",),
    "abcli.engine.engine": ("Engine",),
    "abcli.errors": (
        *("AbcliError", "BatchError", "CancelledError", "ContextFullError", "DownloadError", "EvaluationDataError"),
        *("GrammarError", "ModelFileError", "NativeError", "OutOfMemoryError", "ProfileError", "PromptError"),
        *("SessionError", "TemplateError", "ToolServerError", "UnsupportedModelError", "UsageError"),
    ),
    "abcli.likelihood": ("TokenScore",),
    "abcli.llama": ("Llama",),
    "abcli.llm": ("LLM", "load"),
    "abcli.merge": ("Merged", "Merger"),
    "abcli.protocols": ("Sampler", "Tokenizer"),
    "abcli.sampling": ("Choice", "GenerationConfig", "SamplingConfig"),
    "abcli.trace.page": ("save_trace",),
    "abcli.trace.trace": ("Trace",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "AbcliError",
    "Answer",
    "BatchError",
    "CancelledError",
    "Chat",
    "Choice",
    "ContextFullError",
    "DownloadError",
    "Engine",
    "EvaluationDataError",
    "GenerationConfig",
    "GrammarError",
    "Llama",
    "LoraConfig",
    "Merged",
    "Merger",
    "Message",
    "ModelFileError",
    "NativeError",
    "OutOfMemoryError",
    "Piece",
    "ProfileError",
    "PromptError",
    "Sampler",
    "SamplingConfig",
    "SessionError",
    "TemplateError",
    "Timings",
    "TokenScore",
    "Tokenizer",
    "Tool",
    "ToolCall",
    "ToolServerError",
    "Trace",
    "UnsupportedModelError",
    "Usage",
    "UsageError",
    "__version__",
    "load",
    "save_trace",
]


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    home = _HOME_OF.get(name)
    if name == "merge":
        return import_module("abcli.merge")
    if home is None:
        raise AttributeError(f"module 'abcli' has no attribute {name!r}")
    return getattr(import_module(home), name)
