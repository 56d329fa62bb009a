"""Flags declared as dataclass fields, so that commands can share groups of them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape


def flag(help_text: str, *names: str, show_default: bool | str = True, **settings: Any) -> Any:
    """The typer option of one flag, for use in `Annotated`; a default can be said in words."""
    if isinstance(show_default, str):
        # The parser itself would put words between parentheses.
        help_text += f" [dim]{escape(f'[default: {show_default}]')}[/dim]"
        show_default = False
    return typer.Option(*names, help=help_text, show_default=show_default, **settings)


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Spread every dataclass parameter of `function` into its fields, so that typer sees plain flags.

    A group's `panel` class variable is the heading of its flags in the help.
    """
    signature = inspect.signature(function, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if dataclasses.is_dataclass(parameter.annotation)
    }
    plain = [parameter for name, parameter in signature.parameters.items() if name not in groups]
    flat = plain + [parameter for group in groups.values() for parameter in _parameters(group)]

    @functools.wraps(function)
    def wrapper(**values: Any) -> None:
        arguments = {
            name: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        function(**values, **arguments)

    wrapper.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return wrapper


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        setting = field.metadata.get("setting")
        if setting is not None:
            hints[field.name] = Annotated[hints[field.name], flag(setting.help, *setting.flags)]
        for option in hints[field.name].__metadata__:
            option.rich_help_panel = group.panel
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(group)
    ]
