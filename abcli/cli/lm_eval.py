"""`abcli lm-eval`: EleutherAI's lm-evaluation-harness with a model of abcli's."""

from __future__ import annotations

import sys

import typer

from abcli.config import ENV_DEBUG
from abcli.errors import AbcliError, UsageError

app = typer.Typer()
# What is a word of lm_eval's own goes to lm_eval, "--help" after it too.
_SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}


@app.command(context_settings=_SETTINGS)
def lm_eval(context: typer.Context) -> None:
    """Hand all arguments on to lm_eval, with abcli's model unless one is named."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise UsageError("lm-eval is not installed", "pip install 'abcli[lm-eval]'") from error
    # It registers the model.
    import abcli.lm_eval_model  # noqa: F401

    sys.argv = ["lm_eval", *with_model(context.args)]
    try:
        cli_evaluate()
    except ValueError as error:
        # So it refuses tasks and settings.
        raise AbcliError(f"lm_eval: {error}", f"see abcli lm-eval run --help, or set {ENV_DEBUG}=1") from error


def with_model(arguments: list[str]) -> list[str]:
    """lm_eval's arguments, with abcli's model if something is to be evaluated and nothing says by which model."""
    if arguments in ([], ["run"]) or arguments[0] in ("ls", "validate"):
        return arguments
    named = {word.partition("=")[0] for word in arguments} & {"--model", "-M", "--config", "-C"}
    return arguments if named else [*arguments, "--model", "abcli"]
