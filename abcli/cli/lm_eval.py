"""`abcli lm-eval`: EleutherAI's lm-evaluation-harness with a model of abcli's."""

from __future__ import annotations

import sys

import typer

from abcli.errors import UsageError

app = typer.Typer()


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def lm_eval(context: typer.Context) -> None:
    """Hand all arguments on to lm_eval, with `--model abcli` unless another model is named."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise UsageError("lm-eval is not installed", "pip install 'abcli[lm-eval]'") from error
    # It registers the model.
    import abcli.lm_eval_model  # noqa: F401

    arguments = list(context.args)
    if "--tasks" in arguments and not any(word.partition("=")[0] in ("--model", "-M") for word in arguments):
        arguments += ["--model", "abcli"]
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
