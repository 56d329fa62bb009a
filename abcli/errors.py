"""Every error abcli raises on purpose, as one tree.

AbcliError                      exit code 1
|-- UsageError                  exit code 2: settings that make no sense
|-- ModelFileError              a missing, damaged or foreign model file
|-- DownloadError               a model that cannot be fetched from the hub
|-- UnsupportedModelError       a sound file that abcli cannot serve as asked
|-- OutOfMemoryError            the set-up does not fit into memory
|-- NativeError                 llama.cpp refused or failed
|-- ContextFullError            more tokens than the context holds
|-- PromptError                 an empty or undecodable prompt
|-- TemplateError               a chat template that is missing, broken or refuses the messages
|-- GrammarError                a grammar or JSON schema that cannot be used
|-- SessionError                a chat session that cannot be read or written
|-- ProfileError                a calibrated profile that is missing or cannot be used
|-- EvaluationDataError         data for an evaluation that is missing, damaged or too little
|-- ToolServerError             a server of tools that cannot be started or does not answer as it should
|-- BatchError                  a batch's input or output that cannot be read, written, locked or continued
`-- CancelledError                 exit code 130: the user interrupted
"""

from __future__ import annotations


class AbcliError(Exception):
    """What is wrong, with the value (`message`), and what to do about it (`hint`)."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(AbcliError):
    """A setting, or a combination of settings, that makes no sense; `setting` is the one to blame, if it is one.

    Messages and hints of all errors write settings as Python names between backquotes (`engine=contexts`), which the
    command line shows as its flags.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "", *, setting: str = "") -> None:
        super().__init__(message, hint)
        self.setting = setting


class ModelFileError(AbcliError):
    """A model file that is missing, unreadable, truncated, damaged or not GGUF."""


class DownloadError(AbcliError):
    """A model that cannot be fetched: no network, no permission, no space, or not what the hub promised."""


class UnsupportedModelError(AbcliError):
    """A sound model that cannot be used in the way that was asked for."""


class OutOfMemoryError(AbcliError):
    """The requested set-up needs more memory than there is."""


class NativeError(AbcliError):
    """A call into llama.cpp failed."""


class ContextFullError(AbcliError):
    """A prompt that does not fit. `used` and `available` are numbers of tokens."""

    def __init__(self, used: int, available: int, hint: str = "") -> None:
        super().__init__(
            f"the prompt needs {used} tokens, but the context holds {available}",
            hint or "shorten the prompt, or ask for a larger `ctx_size`",
        )
        self.used = used
        self.available = available


class PromptError(AbcliError):
    """A prompt that is empty or is not valid UTF-8."""


class TemplateError(AbcliError):
    """A chat template that is missing, cannot be rendered or refuses the messages."""


class GrammarError(AbcliError):
    """A GBNF grammar or JSON schema that cannot be used."""


class SessionError(AbcliError):
    """A chat session that cannot be read, written or locked."""


class ProfileError(AbcliError):
    """A profile that is missing, damaged or made for another model."""


class EvaluationDataError(AbcliError):
    """A file of evaluation data that cannot be used; the message names the line where one is to blame."""


class ToolServerError(AbcliError):
    """A server of tools that cannot be started, or does not answer as it should."""


class BatchError(AbcliError):
    """The input or output of a batch that cannot be read, written, locked or continued."""


class CancelledError(AbcliError):
    """The user interrupted a running computation."""

    exit_code = 130

    def __init__(self, message: str = "interrupted", hint: str = "") -> None:
        super().__init__(message, hint)
