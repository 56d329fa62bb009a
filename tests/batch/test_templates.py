"""Templates: places are filled in as text, and everything else stays as it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.batch.templates import check_fields, parse_template
from abcli.errors import PromptError, UsageError

NAMES = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='{}"'), min_size=1, max_size=6
).filter(lambda name: name == name.strip())
PLAIN = st.text(st.characters(exclude_characters="{")) | st.just("{ not a place }")


@given(parts=st.lists(st.tuples(PLAIN, NAMES, st.booleans()), min_size=1, max_size=4), values=st.data())
def test_places_are_filled_and_the_rest_stays(parts: list[tuple[str, str, bool]], values: st.DataObject) -> None:
    record = {name: values.draw(st.text(max_size=8)) for _, name, _ in parts}
    text = "".join(f"{plain}{{{{ {name} }}}}" if wide else f"{plain}{{{{{name}}}}}" for plain, name, wide in parts)
    assert parse_template(text).fill(record) == "".join(plain + record[name] for plain, name, _ in parts)


def test_what_is_filled_in_is_never_read_as_a_place() -> None:
    assert parse_template("{{a}}{{b}}").fill({"a": "{{b}}", "b": "{{a}}"}) == "{{b}}{{a}}"


def test_braces_are_written_as_quoted_text() -> None:
    assert parse_template('{{"{{"}}x}} {{a}} {{ "}}" }}{').fill({"a": 1}) == "{{x}} 1 }}{"


def test_values_that_are_no_text() -> None:
    record = {"none": None, "yes": True, "half": 0.5, "list": [1, {"é": None}], "unused": 1}
    template = parse_template("{{none}}|{{yes}}|{{half}}|{{list}}")
    assert template.fill(record) == '|true|0.5|[1, {"é": null}]'
    assert template.fields == ("none", "yes", "half", "list")


@pytest.mark.parametrize("text", ["a\n{{", "a\n{{}}", "a\n{{ }}", "a\n{{a\n}}", "a\n{{a}", "a\n{{{a}}}", 'a\n{{"a}}'])
def test_broken_places_are_refused_with_their_line(text: str) -> None:
    with pytest.raises(UsageError, match="line 2"):
        parse_template(text)


@pytest.mark.parametrize("text", ["", "the same for all", '{{"{{"}}'])
def test_templates_without_a_field_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no field"):
        parse_template(text)


def test_missing_fields_name_those_there_are() -> None:
    template = parse_template("{{question}}")
    with pytest.raises(PromptError) as caught:
        template.fill({"Question": 1, "answer": 2})
    assert "{{question}}" in caught.value.message
    assert caught.value.hint == "the fields are 'Question', 'answer'"
    with pytest.raises(UsageError) as refused:
        check_fields(template, tuple(f"column {number}" for number in range(30)))
    assert refused.value.hint.endswith("'column 19', ...")
    check_fields(template, ("question",))
