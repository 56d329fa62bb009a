"""JSON schemas as grammars."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.errors import GrammarError
from abcli.grammar import gbnf
from abcli.native import grammar as grammar_module
from abcli.native.grammar import schema_to_gbnf
from tests.native.common import accepted_by_llama_cpp

GOOD_SCHEMAS = [
    {},
    {"type": "object"},
    {"type": "array", "items": {}},
    {"type": "array", "items": True},
    {"type": "object", "properties": {"any": {}, "titled": {"title": "T", "default": 3}}},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "additionalProperties": True, "properties": {"a": {"type": "null"}}},
    {"type": ["string", "null"]},
    {"anyOf": [{"type": "integer"}, {"const": 'x\\y"z'}]},
    {"type": "string", "minLength": 1, "maxLength": 500},
    {"type": "string", "pattern": "^[A-Z]{2}-\\}(a|b)*.{0,3}$"},
    {"type": "string", "format": "date-time"},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}]},
    {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 100},
    {"properties": {"properties": {"type": "object", "properties": {"minItems": {"type": "integer"}}}}},
    {
        "$defs": {"node": {"properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}}},
        "$ref": "#/$defs/node",
    },
    {"properties": {"$ref": {"const": {"$ref": "https://example.com"}}, "title": {"type": "integer"}}},
    {"components": {"schemas": {"a/b": {"type": "null"}}}, "$ref": "#/components/schemas/a~1b"},
    {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(60)}},
    {"enum": ["a", 1, None, True, {"x": [1, 2]}, "日本", "😀", "tab\tnewline\n"]},
]


@pytest.mark.parametrize("schema", GOOD_SCHEMAS, ids=range(len(GOOD_SCHEMAS)))
def test_good_schemas(model, schema):
    grammar = schema_to_gbnf(json.dumps(schema))
    gbnf.check(grammar)
    assert accepted_by_llama_cpp(model, grammar)


def test_an_empty_schema_for_items_means_any_value():
    rules = schema_to_gbnf('{"type": "array", "items": {}}')
    assert "item ::= item-0 | item-1 | item-2 | item-3 | item-4 | item-5" not in rules
    for kind in ("object", "array", "string", "number", "boolean", "null"):
        assert f"\n{kind} ::=" in "\n" + rules


def nested(depth):
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "integer"}


BAD_SCHEMAS = [
    ("", "not JSON"),
    ("{", "not JSON"),
    ("[" * 100_000, "cannot be read"),
    ("[]", "not an object"),
    ("true", "not an object"),
    ('{"const": NaN}', "NaN"),
    ('{"const": ' + "1" * 5000 + "}", "cannot be read"),
    ('{"type": "object", "x": "' + "x" * 300_000 + '"}', "characters"),
    ('{"type": "strange"}', "strange"),
    ('{"type": {"a": 1}}', "cannot be turned"),
    ('{"properties": []}', "cannot be turned"),
    ('{"properties": {"a": 5}}', "cannot be turned"),
    ('{"anyOf": 5}', "cannot be turned"),
    ('{"anyOf": []}', "JSON schema"),
    ('{"$ref": "https://example.com/schema.json"}', "outside itself: 'https://example.com"),
    ('{"properties": {"a": {"$ref": "http://127.0.0.1/x"}}}', "outside itself"),
    ('{"$ref": "other.json#/a"}', "outside itself"),
    ('{"$ref": "#"}', "outside itself"),
    ('{"$ref": 5}', "outside itself"),
    ('{"$ref": "#/$defs/missing"}', "missing"),
    ('{"type": "string", "maxLength": 501}', "maxLength 501"),
    ('{"type": "string", "minLength": 1000000000000}', "minLength 1000000000000"),
    ('{"type": "array", "items": {"type": "null"}, "maxItems": 2.5}', "maxItems 2.5"),
    ('{"type": "array", "items": {"type": "null"}, "minItems": -1}', "minItems -1"),
    ('{"type": "array", "items": {"type": "null"}, "minItems": 5, "maxItems": 2}', "minItems 5 above maxItems 2"),
    ('{"type": "string", "pattern": "abc"}', "Pattern must start"),
    ('{"type": "string", "pattern": "^a]$"}', "stray ']'"),
    ('{"type": "string", "pattern": "^a}$"}', "stray '}'"),
    ('{"type": "string", "pattern": "^[a$"}', "Unbalanced"),
    ('{"type": "string", "pattern": "^*$"}', "cannot be turned"),
    ('{"type": "string", "pattern": "^a{1000000000}$"}', "{1000000000} in a pattern"),
    ('{"type": "string", "pattern": "^a{3,2000}$"}', "too many repetitions"),
    ('{"type": "string", "pattern": "^a{b}$"}', "quantifier"),
    ('{"type": "string", "pattern": "^\\\\d+$"}', "cannot be used"),
    ('{"type": "string", "pattern": "^(?:a)$"}', "Unsupported pattern"),
    ('{"type": "string", "pattern": "^' + "(" * 5000 + '$"}', "cannot be turned"),
    ('{"const": "\\ud800"}', "not valid Unicode"),
    ('{"properties": {"' + "n" * 300 + '": {"type": "null"}}}', "name of 300 characters"),
    (json.dumps(nested(70)), "more than 64 deep"),
    (
        json.dumps({"anyOf": [{"type": "string", "minLength": 400, "format": str(i)} for i in range(60)]}),
        "too many repetitions",
    ),
]


@pytest.mark.parametrize(("text", "what"), BAD_SCHEMAS, ids=range(len(BAD_SCHEMAS)))
def test_bad_schemas_are_refused_in_one_line(text, what):
    with pytest.raises(GrammarError) as caught:
        schema_to_gbnf(text)
    assert what in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_a_reference_is_not_taken_for_a_property_of_the_same_name():
    schema = {
        "$defs": {"name": {"enum": ["of the definition"]}},
        "properties": {"name": {"enum": ["of the property"]}, "other": {"$ref": "#/$defs/name"}},
    }
    rules = dict(line.split(" ::= ", 1) for line in schema_to_gbnf(json.dumps(schema)).splitlines())
    assert rules["name"] == '"\\"of the property\\""'
    assert rules[rules["other"]] == '"\\"of the definition\\""'


def test_nothing_is_ever_fetched(monkeypatch):
    """`python -O` would remove the converter's own guard, which is an assertion."""

    def fail(*_):
        raise AssertionError("resolve_refs was called")

    monkeypatch.setattr(grammar_module.SchemaConverter, "resolve_refs", fail)
    assert "item ::= null" in schema_to_gbnf('{"$defs": {"a": {"type": "null"}}, "items": {"$ref": "#/$defs/a"}}')
    with pytest.raises(GrammarError, match="outside itself"):
        schema_to_gbnf('{"allOf": [{"x": {"y": [{"$ref": "https://example.com/x"}]}}]}')


KEYS = (
    *("type", "properties", "items", "anyOf", "allOf", "enum", "const", "$ref", "required", "pattern", "format"),
    *("minItems", "maxLength", "additionalProperties", "prefixItems", "a", "root", "space"),
)
WORDS = st.sampled_from(["string", "object", "array", "integer", "#/a", "^a*$", "^[b]{2}c}$"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 600) | WORDS | st.text("a#/$[]{}^", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["type", "properties", "items", "anyOf", "a"]), json_values))
@settings(max_examples=200, deadline=None)
def test_any_schema_is_turned_into_a_checked_grammar_or_refused(schema):
    try:
        grammar = schema_to_gbnf(json.dumps(schema))
    except GrammarError:
        return
    gbnf.check(grammar)


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)))
@settings(max_examples=100, deadline=None)
def test_a_constant_is_spelled_as_one_literal(value):
    text = json.dumps(value)
    literal = grammar_module._literal(text)
    inner = literal[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    assert json.loads(inner) == value
