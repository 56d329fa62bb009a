"""A stranger's template can neither reach into Python nor eat the machine, and its errors say where they are."""

from __future__ import annotations

import time
from typing import Any

import pytest

from abcli.chat import sandbox
from abcli.chat.sandbox import CompiledTemplate
from abcli.errors import TemplateError

DOUBLING = "{%% set n = namespace(x='ab') %%}{%% for i in range(60) %%}%s{%% endfor %%}"
GREEDY = {
    "repeat": "{{ 'a' * 10**12 }}",
    "repeat a list": "{{ [0] * 10**12 }}",
    "repeat reversed": "{{ 10**12 * 'a' }}",
    "power": "{{ 10 ** 1000000000 }}",
    "product": "{% set n = namespace(x=10**30) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "plus": DOUBLING % "{% set n.x = n.x + n.x %}",
    "tilde": DOUBLING % "{% set n.x = n.x ~ n.x %}",
    "list literal": DOUBLING % "{% set n.x = [n.x, n.x] %}",
    "tuple literal": DOUBLING % "{% set n.x = (n.x, n.x) %}",
    "dict literal": DOUBLING % "{% set n.x = {'a': n.x, 'b': n.x} %}",
    "append": "{% set a = [] %}{% for i in range(100000) %}{% set _ = a.append('x' * 1000) %}{% endfor %}",
    "append itself": DOUBLING % "{% set m = [n.x] %}{% set _ = m.append(n.x) %}{% set n.x = m %}",
    "json of a long map": "{{ range(10**5) | map('string') | map('center', 10**5) | tojson }}",
    "dict call": DOUBLING % "{% set n.x = dict(a=n.x, b=n.x) %}",
    "block": DOUBLING % "{% set x %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = x %}",
    "replace method": DOUBLING % "{% set n.x = n.x.replace('a', n.x) %}",
    "replace filter": DOUBLING % "{% set n.x = n.x | replace('a', n.x) %}",
    "join method": DOUBLING % "{% set n.x = n.x.join([n.x, n.x]) %}",
    "join filter": DOUBLING % "{% set n.x = [n.x, n.x] | join(n.x) %}",
    "percent": DOUBLING % "{% set n.x = '%s%s' % (n.x, n.x) %}",
    "format filter": DOUBLING % "{% set n.x = '%s%s' | format(n.x, n.x) %}",
    "format method": DOUBLING % "{% set n.x = '{0}{0}'.format(n.x) %}",
    "slices": DOUBLING % "{% set n.x = n.x[:] + n.x[:] %}",
    "many slices": "{% set x = 'a' * 1000000 %}" + "{% set y = x[1:] %}" * 10,
    "wide percent": "{{ '%1000000000d' % 1 }}",
    "wide percent from arguments": "{{ '%*d' % (1000000000, 1) }}",
    "wide braces": "{{ '{:1000000000d}'.format(1) }}",
    "wide nested braces": "{{ '{:{}}'.format(1, 1000000000) }}",
    "center method": "{{ 'a'.center(10**10) }}",
    "center filter": "{{ 'a' | center(10**10) }}",
    "indent": "{{ 'a' | indent(10**10, true) }}",
    "json indent": "{{ messages | tojson(indent=10**10) }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "range": "{{ range(10**10) | list }}",
    "constant text in a loop": "{% set x %}{% for i in range(100000) %}" + "x" * 2000 + "{% endfor %}{% endset %}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "time": "{{ strftime_now('%1000000000Y') }}",
}
ENDLESS = {
    "ranges": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "lists": "{% set r = range(100000) | list %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "filters": "{% set r = range(100000) | list %}{% for i in r %}{{ r | sort | first }}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}
FORBIDDEN = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "function globals": "{{ raise_exception.__globals__['re'] }}",
    "changing messages": "{{ messages.append(1) }}",
    "changing a list in a message": "{{ messages[0].list.append(1) }}",
    "clearing messages": "{{ messages.clear() }}",
    "clearing a list": "{% set a = [1] %}{{ a.clear() }}",
    "changing a message": "{{ messages[0].update(role='x') }}",
    "format to attributes": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "other files": "{% include 'x' %}",
    "writing out a namespace": "{{ namespace(a=1) }}",
}
BROKEN = {
    "syntax": ("a\nb{% for %}", "line 2"),
    "undefined": ("\n\n{{ nobody.name }}", "'nobody' is undefined (line 3)"),
    "type": ("\n{{ 'a' + 1 }}", "(line 2)"),
    "division": ("{{ 1 / 0 }}", "division by zero (line 1)"),
    "unknown filter": ("{{ 1 | nonsense }}", "No filter named 'nonsense'"),
    "wrong arguments": ("{{ 'a' | replace }}", "(line 1)"),
    "depth": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
    "security": ("x\n{{ ''.__class__.__mro__ }}", "(line 2)"),
}
WORKING = {
    "{{ messages | tojson }}": '[{"role": "user", "content": "<h\u00e9>"}]',
    "{{ messages[0] | tojson(indent=1) }}": '{\n "role": "user",\n "content": "<h\u00e9>"\n}',
    "{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{% break %}{% endfor %}": "1True1",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}": "role=user;content=<h\u00e9>;",
    "a{% generation %}b{{ 1 + 1 }}{% endgeneration %}c": "ab2c",
    "{% if true %}\n  x\n  {% endif %}\ny": "  x\ny",
    "{{ messages | map(attribute='role') | join(',') }}": "user",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}": "1",
    "{{ ' a b '.strip().split(' ')[-1] ~ 'c' * 3 ~ 2 ** 3 }}": "bccc8",
    "{{ '%s-%d' % ('a', 3) }}{{ '{}:{x}'.format(1, x=2) }}": "a-31:2",
    "{% set n = namespace(a=[]) %}{% set n.a = n.a + [1] %}{{ n.a }}{{ (1,) }}{{ {'k': 'v'} }}": "[1](1,){'k': 'v'}",
    "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('ab') }}": "abab",
    "{{ tools is none }}{{ nothing is defined }}{{ nothing }}": "TrueFalse",
    "{{ messages[1:] | length }}{{ 'abc'[::-1] }}{{ 'a\nb' | indent(2) }}": "0cbaa\n  b",
    "{{ strftime_now('%Y') | length }}": "4",
    "{% set a = [] %}{% set _ = a.append({'k': 1}) %}{{ a.pop() }}{{ a }}": "{'k': 1}[]",
    "{% set a = messages[1:] %}{% set _ = a.append(2) %}{{ a }}{{ messages | length }}": "[2]1",
    "{{ ['a', 'b'] | map('upper') | tojson }}": '["A", "B"]',
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{{ [3, 1] | sort | sum }}{{ 1.25 | round(1) }}": "1241.2",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}": "123",
    "{{ 'x' | upper | replace('X', 'y') | trim }}{{ none | default('d', true) }}": "yd",
}


def render(source: str) -> str:
    variables: dict[str, Any] = {"messages": [{"role": "user", "content": "<h\u00e9>"}], "tools": None}
    return CompiledTemplate(source).render(variables, content_size=4)


@pytest.mark.parametrize("source", WORKING)
def test_what_templates_use_works(source: str) -> None:
    assert render(source) == WORKING[source]


@pytest.mark.parametrize("case", GREEDY)
def test_a_template_cannot_build_something_huge(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A smaller budget is spent sooner; the real one takes up to three seconds.
    monkeypatch.setattr(sandbox, "_BASE_BUDGET", 4_000_000)
    with pytest.raises(TemplateError) as raised:
        render(GREEDY[case])
    assert "\n" not in raised.value.message
    assert raised.value.hint == "choose another template with `chat_template`"


@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_cannot_run_for_ever(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_SECONDS", 0.1)
    started = time.monotonic()
    with pytest.raises(TemplateError, match=r"runs longer|builds more"):
        render(ENDLESS[case])
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("case", FORBIDDEN)
def test_a_template_cannot_reach_out(case: str) -> None:
    with pytest.raises(TemplateError):
        render(FORBIDDEN[case])


@pytest.mark.parametrize("case", BROKEN)
def test_an_error_says_what_and_where(case: str) -> None:
    source, expected = BROKEN[case]
    with pytest.raises(TemplateError) as raised:
        render(source)
    assert expected in raised.value.message
    assert raised.value.hint


def test_a_template_may_collect_the_whole_text_in_one_variable() -> None:
    messages = [{"role": "user", "content": "x" * 200}] * 600
    source = (
        "{% set n = namespace(x='') %}{% for m in messages %}"
        "{% set n.x = n.x + '<' + m.role + '>' + m.content + '</s>' %}{% endfor %}{{ n.x }}"
    )
    text = CompiledTemplate(source).render({"messages": messages}, content_size=120_000, message_count=600)
    assert text == f"<user>{'x' * 200}</s>" * 600


def test_a_long_conversation_has_a_larger_budget() -> None:
    content = "x" * 3_000_000
    source = (
        "{% set n = namespace(x='') %}{% for i in range(30) %}{% set n.x = messages[0].content + '!' %}{% endfor %}ok"
    )
    variables = {"messages": [{"role": "user", "content": content}]}
    assert CompiledTemplate(source).render(variables, content_size=len(content)) == "ok"
    with pytest.raises(TemplateError, match="builds more text"):
        CompiledTemplate(source).render(variables, content_size=0)
