"""Pages that open from the disk: one file each, without a network, scripts and styles named by their hashes."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

_FILES = Path(__file__).parent


def render(template: str, script: str = "", **values: Any) -> str:
    """The page that `template` makes of `values`, all of which it escapes, with the script file `script`.

    Nothing but that script and our styles is run or loaded, whatever the values contain (Content-Security-Policy).
    """
    style, code = _text("style.css"), _text(script) if script else ""
    scripts = f"'sha256-{_hash(code)}'" if code else "'none'"
    policy = (
        f"default-src 'none'; style-src 'sha256-{_hash(style)}'; script-src {scripts}; "
        "base-uri 'none'; form-action 'none'"
    )
    found = _environment().get_template(template)
    # Both are files of ours.
    return found.render(policy=policy, style=Markup(style), script=Markup(code), **values)  # noqa: S704


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FILES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _text(name: str) -> str:
    return (_FILES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return b64encode(hashlib.sha256(text.encode()).digest()).decode()
