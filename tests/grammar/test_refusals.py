"""Schemas that are refused, and what is said of them."""

import json
import resource
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.errors import GrammarError, UsageError
from abcli.grammar.check import check
from abcli.grammar.guidance import compile_constraint
from abcli.sampling import SamplingConfig
from tests.grammar.conftest import constraint, writes


def properties(schema):
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


def refusal_of(work):
    try:
        work()
    except GrammarError as error:
        return error
    return None


def nested(depth):
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "integer"}


# Keywords that cannot be enforced, each with its place.
UNENFORCED = {
    "$.properties.a.not": {"not": {"type": "string"}},
    "$.properties.a.uniqueItems": {"type": "array", "uniqueItems": True},
    "$.properties.a.contains": {"contains": {"type": "string"}},
    "$.properties.a.if": {"if": {"type": "string"}, "then": {"minLength": 1}},
    "$.properties.a.propertyNames": {"propertyNames": {"pattern": "^a"}},
    "$.properties.a.dependentRequired": {"dependentRequired": {"x": ["y"]}},
    "$.properties.a.unevaluatedProperties": {"unevaluatedProperties": False},
    "$.properties.a.$dynamicRef": {"$dynamicRef": "#x"},
    "$.properties.a.oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "$.properties.a.anyOf[1].not": {"anyOf": [{"type": "null"}, {"not": {}}]},
    "$.properties.a.items.pattern": {"items": {"pattern": "(?=x)"}},
    "$.properties.a.minProperties": {"type": "object", "minProperties": 3},
    "$.$defs.d.not": {"$ref": "#/$defs/d"},
}
BAD = [
    ("", "not JSON"),
    ("{", "not JSON: Expecting property name"),
    ("[" * 100_000, "nests too deep"),
    ("[]", "not an object"),
    ("false", "allows nothing"),
    ('{"const": NaN}', "NaN"),
    ('{"const": ' + "1" * 5000 + "}", "cannot be read"),
    ('{"type": "object", "x": "' + "x" * 300_000 + '"}', "characters"),
    (
        '{"type": "strange"}',
        "wrong at $.type: it should be one or more of object, array, string, number, boolean, null",
    ),
    ('{"type": {"a": 1}}', "$.type"),
    ('{"properties": []}', "$.properties: it should be an object of schemas"),
    ('{"properties": {"a b": 5}}', '$.properties["a b"]: it should be a schema'),
    ('{"anyOf": 5}', "$.anyOf"),
    ('{"anyOf": []}', "$.anyOf"),
    ('{"enum": 5}', "$.enum"),
    ('{"required": true}', "$.required: it should be a list of names"),
    ('{"minLength": -1}', "$.minLength: it should be a whole number from 0, not -1"),
    ('{"maxItems": 2.5}', "$.maxItems"),
    ('{"minimum": "1"}', "$.minimum"),
    ('{"multipleOf": 0}', "$.multipleOf"),
    ('{"pattern": 5}', "$.pattern"),
    ('{"$ref": "https://example.com/schema.json"}', "outside itself: 'https://example.com/schema.json' at $.$ref"),
    ('{"properties": {"a": {"$ref": "http://127.0.0.1/x"}}}', "outside itself"),
    ('{"$ref": "other.json#/a"}', "outside itself"),
    ('{"$ref": 5}', "$.$ref"),
    ('{"$ref": "#/$defs/missing"}', "'#/$defs/missing' at $.$ref, which it does not contain"),
    ('{"$ref": "#/type", "type": "object"}', "which is no schema"),
    ('{"$ref": "#"}', "refers to itself without an end"),
    ('{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}', "without an end"),
    ('{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}', "no answer that ends"),
    ('{"type": "array", "items": {"$ref": "#"}, "minItems": 1}', "no answer that ends"),
    ('{"type": "array", "items": {"type": "null"}, "minItems": 5, "maxItems": 2}', "allows nothing at $"),
    (json.dumps(properties({"allOf": [{"type": "string"}, {"type": "null"}]})), "allows nothing at $.properties.a"),
    (json.dumps(properties({"type": "integer", "minimum": 5, "maximum": 2})), "allows nothing at $.properties.a"),
    ('{"type": "integer", "minimum": 1, "maximum": 2, "multipleOf": 5}', "allows nothing"),
    ('{"type": "string", "pattern": "^a+$", "minLength": 2, "enum": ["b"]}', "allows nothing"),
    ('{"enum": []}', "allows nothing"),
    (
        json.dumps(properties({"patternProperties": {"a": {}, "b": {}}})),
        "patternProperties that may match the same name, at $.properties.a",
    ),
    (
        json.dumps(properties({"type": "object", "properties": {"x": {}, "y": {}}, "maxProperties": 1})),
        "beside properties that are optional, at $.properties.a",
    ),
    ('{"type": "string", "pattern": "a^b"}', "an anchor in the middle of a pattern, at $"),
    ('{"const": "\\ud800"}', "not valid Unicode at $.const"),
    ('{"const": "\\u0001"}', "control character U+0001"),
    ('{"const": 9007199254740993}', "$.const: 9007199254740993"),
    ('{"minimum": 1e300}', "$.minimum"),
    ('{"multipleOf": 0.07}', "$.multipleOf: 0.07"),
    (json.dumps(nested(70)), "more than 64 deep"),
]


@pytest.mark.parametrize("place", UNENFORCED)
def test_what_cannot_be_enforced_is_refused_with_its_place_or_left_out(in_bytes, place):
    schema = properties(UNENFORCED[place]) | {"$defs": {"d": {"not": {}}}}
    with pytest.raises(GrammarError) as caught:
        compile_constraint(constraint(schema))
    assert f" {place}" in caught.value.message
    assert "`schema_lenient`" in caught.value.hint
    compiled = compile_constraint(constraint(schema, lenient=True))
    assert any(remark.startswith(place) and remark.endswith("is not enforced") for remark in compiled.remarks)
    assert writes(in_bytes, constraint(schema, lenient=True), '{"a": 1}' if "Prop" not in place else '{"a": {}}') or (
        "items" in place.lower() and writes(in_bytes, constraint(schema, lenient=True), '{"a": [1]}')
    )


@pytest.mark.parametrize(("text", "what"), BAD, ids=range(len(BAD)))
def test_bad_schemas_are_refused_in_one_line(text, what):
    with pytest.raises(GrammarError) as caught:
        compile_constraint(constraint(text))
    assert what in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    assert caught.value.hint


def test_keywords_that_say_nothing_are_no_error():
    schema = {"uniqueItems": False, "not": False, "then": {}, "unevaluatedProperties": True, "dependentRequired": {}}
    assert compile_constraint(constraint(schema)).remarks == ()


def test_what_is_enforced_differently_is_said():
    schema = properties({"type": "string", "format": "of my own"})
    assert compile_constraint(constraint(schema)).remarks == (
        'the format "of my own" at $.properties.a.format is not checked',
    )
    (remark,) = compile_constraint(constraint({"type": "integer", "maximum": 2**63 - 1})).remarks
    assert remark.startswith("$.maximum is enforced as 9223372036854774784")


def test_a_lenient_schema_says_what_llguidance_leaves_out():
    schema = properties({"type": "object", "properties": {"x": {}, "y": {}}, "maxProperties": 1})
    (remark,) = compile_constraint(constraint(schema, lenient=True)).remarks
    assert remark == "minProperties or maxProperties beside properties that are optional is not enforced"


def test_a_schema_has_no_say_in_how_it_is_compiled(in_bytes):
    schema = {"type": "object", "x-guidance": {"whitespace_pattern": " *", "lenient": True, "coerce_one_of": True}}
    assert not writes(in_bytes, constraint(schema), "{      }")
    with pytest.raises(GrammarError):
        compile_constraint(constraint({"not": {}, **schema}))


def test_only_one_thing_can_be_followed():
    with pytest.raises(UsageError, match="both a JSON schema and a regular expression"):
        check(SamplingConfig(json_schema="{}", regex="a"))
    assert check(SamplingConfig(schema_lenient=True)) == ()


HOSTILE = {
    "repetitions": {"type": "string", "pattern": "^(a{1000}){1000}$"},
    "deep repetitions": {"type": "string", "pattern": "^" + "(" * 100 + "a" + "{1,9})" * 100 + "$"},
    "states": {"type": "string", "pattern": "^(a|b)*a(a|b){20}$", "minLength": 50},
    "multiples": {"allOf": [{"type": "integer"}, *({"multipleOf": prime} for prime in (65521, 65519, 65497))]},
    "a large multiple": {"type": "integer", "multipleOf": 99_991},
    "properties": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(2000)}},
    "many objects": {
        "anyOf": [{"type": "object", "properties": {f"p{i}_{j}": {} for j in range(310)}} for i in range(16)]
    },
    "names by pattern": {"type": "object", "patternProperties": {f"^x{i}_": {} for i in range(64)}},
    "a long enum": {"enum": [f"value {i}" for i in range(15_000)]},
    "laughs in allOf": {
        "$defs": {
            **{f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)},
            "a40": {"type": "object", "properties": {"x": {"type": "integer"}}},
        },
        "$ref": "#/$defs/a0",
    },
    "laughs in oneOf": {
        "$defs": {
            **{f"a{i}": {"oneOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)},
            "a40": {"type": "object"},
        },
        "$ref": "#/$defs/a0",
    },
    "choices in choices": {
        "allOf": [{"anyOf": [{"properties": {f"k{i}": {"const": c}}} for c in (1, 2)]} for i in range(30)]
    },
    "trees": {
        "allOf": [{"$ref": "#/$defs/l"}, {"$ref": "#/$defs/r"}],
        "$defs": {name: {"type": "object", "properties": {"c": {"$ref": f"#/$defs/{name}"}}} for name in "lr"},
    },
    "a chain of references": {
        "$defs": {
            **{f"a{i}": {"$ref": f"#/$defs/a{i + 1}", "title": "t"} for i in range(3000)},
            "a3000": {"type": "integer"},
        },
        "$ref": "#/$defs/a0",
    },
    "a chain of objects": {
        "$defs": {
            **{f"a{i}": {"type": "object", "properties": {"n": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(3000)},
            "a3000": {"type": "integer"},
        },
        "$ref": "#/$defs/a0",
    },
    "counts": {"type": "array", "items": {"type": "array", "maxItems": 20_000}, "minItems": 20_000},
    "too many counts": {"anyOf": [{"type": "array", "minItems": 9_999 + i} for i in range(20)]},
    "an endless count": {"type": "string", "minLength": 10**12},
    "choices to compare": {
        "oneOf": [{"type": "object", "properties": {f"k{i}": {}}, "required": [f"k{i}"]} for i in range(2000)]
    },
    "digits": {"type": "number", "minimum": 1e-300, "maximum": 5e-300},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_schemas_cost_little(in_bytes, case):
    """They are compiled or refused; what is measured is the processor's time, whoever else is busy."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    refusal = refusal_of(lambda: in_bytes.start(constraint(HOSTILE[case])).mask())
    assert refusal is None or "\n" not in refusal.message
    # Machines differ by several times; what has no end takes far longer.
    assert time.process_time() - begin < 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


KEYS = (
    *("type", "properties", "items", "anyOf", "allOf", "oneOf", "enum", "const", "$ref", "required", "pattern"),
    *("minItems", "maxLength", "additionalProperties", "prefixItems", "format", "$defs", "a", "minimum", "multipleOf"),
    *("patternProperties", "nullable", "not", "$id", "$anchor", "minProperties"),
)
WORDS = st.sampled_from(["string", "object", "array", "integer", "#/a", "#", "^a*$", "^[b]{2}c}$", "date", "#/$defs/a"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 600) | st.floats(-9, 9) | WORDS | st.text("a#/$[]{}^", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=5), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_schema_is_compiled_or_refused_with_a_reason(schema, lenient):
    refusal = refusal_of(lambda: compile_constraint(constraint(schema, lenient=lenient)))
    assert refusal is None or (refusal.hint and "\n" not in refusal.message)
