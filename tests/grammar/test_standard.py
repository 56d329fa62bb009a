"""What schemas allow and forbid, as the standard says; the judge is `jsonschema`."""

import json

import jsonschema
import pytest

from tests.grammar.conftest import constraint, follows, writes

TREE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"$ref": "#"}},
    "additionalProperties": False,
}

# Schema, values that are allowed, values that are not.
CASES = {
    "integer bounds": ({"type": "integer", "minimum": -3, "maximum": 120}, [-3, 0, 7, 120], [-4, 121, 1.5, "1"]),
    "exclusive integer bounds": ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10}, [1, 9], [0, 10]),
    "number bounds": ({"type": "number", "minimum": -1.5, "maximum": 2.25}, [-1.5, 0, 2.25, 2.2], [-1.51, 2.26, 3]),
    "exclusive number bounds": (
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        [0.5, 0.001, 0.999],
        [0, 1, -0.1],
    ),
    "one bound": ({"type": "integer", "minimum": 100}, [100, 12345], [99, -100]),
    "64 bits": (
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        [0, 2**62, -(2**62)],
        [2**63, -(2**63) - 1],
    ),
    "a whole number excluded beside a near bound": (
        {"type": "number", "exclusiveMinimum": -28.5, "exclusiveMaximum": -28},
        [-28.25, -28.001],
        [-28, -28.5],
    ),
    "more than nothing": ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.95}, [0.9, 0.95, 0.001], [0, 0.96]),
    "multipleOf": ({"type": "integer", "multipleOf": 15}, [0, 15, -30, 450], [1, 20]),
    "multipleOf a fraction": ({"type": "number", "multipleOf": 0.25}, [0, 0.25, 7.5, 3], [0.1, 0.3]),
    "lengths": ({"type": "string", "minLength": 2, "maxLength": 4}, ["ab", "日本語です"[:4], '"\\"'], ["a", "abcde"]),
    "a long text": ({"type": "string", "minLength": 10_000}, ["x" * 10_000, "y" * 10_001], ["x" * 9_999]),
    "a pattern without anchors": ({"type": "string", "pattern": "b+c"}, ["bc", "xxbbcyy"], ["b", "cb", ""]),
    "a group that captures nothing": ({"type": "string", "pattern": "^(?:ab)+$"}, ["ab", "abab"], ["aba"]),
    "shorthands": (
        {"type": "string", "pattern": r"^\d+\w\s\.\/$"},
        ["1a ./", "12_\t./"],
        ["a ./", "1a./", "1aXX/", "1a .."],
    ),
    "alternation at the top": ({"type": "string", "pattern": "^red$|^blue$"}, ["red", "blue"], ["redblue", '"red']),
    "an anchor for one alternative": (
        {"type": "string", "pattern": "^red|blue$"},
        ["redx", "xblue"],
        ["xred", "bluex"],
    ),
    "no quotes and no lines": ({"type": "string", "pattern": "^[^@]+@[^@]+$"}, ['a"b@c\n', "x@y"], ["xy", "a@b@c"]),
    "a class with quotes": ({"type": "string", "pattern": r"^[\"'\\]{2}$"}, ["\"'", "\\\\"], ["a'"]),
    "a class with brackets": ({"type": "string", "pattern": r"^[[&&^\]-]+$"}, ["[&]^-"], ["a"]),
    "an escaped letter": ({"type": "string", "pattern": r"^\u0041\x42\t$"}, ["AB\t"], ["ab\t"]),
    "a dot is no line's end": ({"type": "string", "pattern": "^.$"}, ["a", "é", "😀"], ["\n", "ab"]),
    "types with an enum": ({"type": ["string", "null"], "enum": ["a", None, 5]}, ["a", None], [5, "b"]),
    "types with properties and items": (
        {
            "type": ["object", "array"],
            "properties": {"a": {"type": "integer"}},
            "items": {"type": "boolean"},
            "additionalProperties": False,
        },
        [{}, {"a": 1}, [], [True, False]],
        [{"a": "x"}, [1], 1],
    ),
    "const of an object": ({"const": {"a": [1, None, "x"], "b": True}}, [{"a": [1, None, "x"], "b": True}], [{}, 1]),
    "const of a number": ({"const": 1.0}, [1], [2]),
    "const of a fraction": ({"const": -0.5}, [-0.5], [0.5]),
    "enum of every type": (
        {"enum": ["a", 1, 2.5, None, True, {"x": [1, 2]}, [], "tab\tnewline\n"]},
        ["a", 1, 2.5, None, True, {"x": [1, 2]}, [], "tab\tnewline\n"],
        ["b", 2, False, {}, [1]],
    ),
    "allOf with $ref": (
        {"allOf": [{"$ref": "#/$defs/c"}], "$defs": {"c": {"enum": ["red", "green"]}}},
        ["red", "green"],
        ["blue", {}],
    ),
    "allOf with siblings": (
        {"type": "integer", "minimum": 1, "allOf": [{"maximum": 5}, {"multipleOf": 2}]},
        [2, 4],
        [0, 1, 6],
    ),
    "anyOf with siblings": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
            "anyOf": [{"properties": {"b": {"const": 1}}, "required": ["b"]}, {"properties": {"c": {"const": 2}}}],
            "additionalProperties": True,
        },
        [{"a": 1, "b": 1}, {"a": 1, "c": 2}, {"a": 1}],
        [{"b": 1}, {"a": "x", "b": 1}],
    ),
    "oneOf that excludes by a name": (
        {
            "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
            "$defs": {
                "cat": {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]},
                "dog": {"type": "object", "properties": {"kind": {"enum": ["dog", "wolf"]}}, "required": ["kind"]},
            },
        },
        [{"kind": "cat"}, {"kind": "wolf"}],
        [{"kind": "cow"}, {}],
    ),
    "oneOf of types and numbers": (
        {"oneOf": [{"type": "string"}, {"type": "integer", "maximum": 3}, {"type": "number", "minimum": 5}]},
        ["a", 3, 5.5],
        [4, None],
    ),
    "oneOf of constants": ({"oneOf": [{"const": 1, "title": "one"}, {"const": 2}, {"const": "1"}]}, [1, 2, "1"], [3]),
    "$ref with siblings": (
        {"$ref": "#/$defs/n", "maximum": 5, "$defs": {"n": {"type": "integer", "minimum": 1}}},
        [1, 5],
        [0, 6],
    ),
    "$ref to itself": (TREE, [{}, {"v": 1, "next": {"v": 2, "next": {}}}], [{"next": {"next": {"v": "x"}}}]),
    "nested groups of definitions": (
        {"$ref": "#/$defs/group/a%20b", "$defs": {"group": {"a b": {"type": "null"}}}},
        [None],
        [1],
    ),
    "an escaped pointer": ({"$ref": "#/$defs/a~1b~0c", "$defs": {"a/b~c": {"type": "null"}}}, [None], [1]),
    "an anchor": ({"$ref": "#here", "$defs": {"x": {"$anchor": "here", "type": "null"}}}, [None], [1]),
    "an identifier": (
        {
            "$id": "https://example.com/root.json",
            "$ref": "part.json#/$defs/y",
            "$defs": {"p": {"$id": "part.json", "$defs": {"y": {"type": "null"}}}},
        },
        [None],
        [1],
    ),
    "prefixItems with items": (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": {"type": "null"}},
        [[], [1], [1, True], [1, True, None, None]],
        [[True], [1, 1], [1, True, 5]],
    ),
    "minItems without items": (
        {"type": "array", "minItems": 2, "maxItems": 3},
        [[1, "a"], [1, 2, {}]],
        [[], [1], [1] * 4],
    ),
    "patternProperties and no other": (
        {"type": "object", "patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": False},
        [{}, {"x_a": 1}, {"x_": 2, "x_b": 3}],
        [{"y": 1}, {"x_a": "s"}],
    ),
    "required outside properties": (
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["z"], "additionalProperties": True},
        [{"z": 1}, {"a": 1, "z": None}],
        [{}, {"a": 1}],
    ),
    "additionalProperties beside optional ones": (
        {"type": "object", "properties": {"age": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
        [{}, {"age": 42}, {"age": 42, "city": "New York"}, {"city": "x"}],
        [{"age": "x"}, {"city": 1}],
    ),
    "Unicode": (
        {"type": "object", "properties": {"größe 日本": {"enum": ["😀", "é"]}}, "required": ["größe 日本"]},
        [{"größe 日本": "😀"}, {"größe 日本": "é"}],
        [{"größe 日本": "e"}, {}],
    ),
    "everything": ({}, [{}, {"a": [1, "x", None]}, [], "s", 1, None, True], []),
    "true": (True, [{"a": 1}, 5, None], []),
    "integral floats as counts": ({"type": "array", "minItems": 1.0, "maxItems": 2.0}, [[1], [1, 2]], [[], [1, 2, 3]]),
    "one property at least": ({"type": "object", "minProperties": 1}, [{"a": 1}], [{}]),
    "a name not to be spelled otherwise": (
        {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "null"}},
        [{"a": 1, "b": None}],
        [],
    ),
    "annotations": (
        {
            "type": "integer",
            "title": "T",
            "default": "x",
            "examples": ["y"],
            "x-own": {"type": "string"},
            "readOnly": True,
        },
        [1],
        ["x"],
    ),
    "an unknown format": ({"type": "string", "format": "of my own"}, ["x"], [1]),
    "keywords of other types": ({"minLength": 2, "minimum": 5}, ["ab", 5, None, []], ["a", 4]),
    "a property called like a keyword": (
        {"type": "object", "properties": {"$ref": {"const": 1}, "not": {"const": 2}}, "additionalProperties": False},
        [{"$ref": 1, "not": 2}],
        [{"$ref": 2}],
    ),
}
DATES = {
    "date": (["2024-02-29", "2000-02-29", "1999-12-31"], ["2023-02-29", "1900-02-29", "2024-13-01", "24-01-01"]),
    "time": (["12:00:00Z", "23:59:59.123456789+05:30"], ["24:00:00Z", "12:00Z", "12:00:60Z", "12:00:00"]),
    "date-time": (
        ["2024-02-29T12:00:00Z", "2024-01-01T00:00:00.1-00:30", "2024-01-01t00:00:00.123456789z"],
        ["2024-01-01", "2024-02-30T12:00:00Z", "2024-01-01T12:00:00", "2024-01-01 12:00:00Z"],
    ),
    "uuid": (["123e4567-e89b-12d3-a456-426614174000"], ["123e4567-e89b-12d3-a456-42661417400", "x"]),
    "email": (["a.b+c@example.org"], ["a@", "@b", "a b@c.de"]),
    "ipv4": (["127.0.0.1", "255.255.255.0"], ["256.0.0.1", "1.2.3", "01.2.3.4"]),
    "ipv6": (["::1", "2001:db8::ff00:42:8329"], ["12345::", "1:2:3"]),
    "hostname": (["a.example", "x-1.y"], ["-a", "a..b", "a" * 64]),
}


def text_of(value):
    return json.dumps(value, ensure_ascii=False)


@pytest.mark.filterwarnings("ignore:Possible (nested set|set intersection)")  # says Python
@pytest.mark.parametrize("case", CASES)
def test_valid_documents_can_be_written_and_others_cannot(in_bytes, case):
    schema, valid, invalid = CASES[case]
    judge = jsonschema.Draft202012Validator(schema)
    for value in valid:
        assert judge.is_valid(value)
        assert writes(in_bytes, constraint(schema), text_of(value)), value
    for value in invalid:
        assert not judge.is_valid(value)
        assert not writes(in_bytes, constraint(schema), text_of(value)), value


@pytest.mark.parametrize("case", CASES)
def test_the_same_in_a_real_vocabulary(in_words, case):
    matchers, tokenize, end = in_words
    schema, valid, invalid = CASES[case]
    for values, expected in ((valid, True), (invalid, False)):
        for value in values:
            assert follows(matchers.start(constraint(schema)), tokenize(text_of(value)), end) is expected, value


@pytest.mark.parametrize("name", DATES)
def test_formats(in_bytes, name):
    valid, invalid = DATES[name]
    schema = constraint({"type": "string", "format": name})
    for text in valid:
        assert writes(in_bytes, schema, text_of(text)), text
    for text in invalid:
        assert not writes(in_bytes, schema, text_of(text)), text


def test_a_name_that_is_spelled_with_escapes_is_not_another_one(in_bytes):
    """llguidance takes it for one: the value would have the wrong type once the answer is read."""
    schema, _, _ = CASES["a name not to be spelled otherwise"]
    text = r'{"\u0061":null}'
    assert not jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
    assert not writes(in_bytes, constraint(schema), text)


def test_nullable_is_what_openapi_says(in_bytes):
    for schema in ({"type": "string", "nullable": True}, {"enum": ["x"], "nullable": True}):
        assert writes(in_bytes, constraint(schema), "null")
        assert writes(in_bytes, constraint(schema), '"x"')
    assert not writes(in_bytes, constraint({"type": "string", "nullable": False}), "null")


def test_older_drafts(in_bytes):
    tuples = constraint({"items": [{"type": "integer"}], "additionalItems": False, "type": "array"})
    assert writes(in_bytes, tuples, "[1]")
    assert not writes(in_bytes, tuples, "[1,1]")
    bound = constraint({"type": "integer", "minimum": 1, "exclusiveMinimum": True})
    assert not writes(in_bytes, bound, "1")
    assert writes(in_bytes, bound, "2")


@pytest.mark.parametrize("required", [[], ["answer"], ["answer", "reason"]])
def test_properties_come_in_the_order_of_the_schema(in_bytes, required):
    properties = {"reason": {"type": "string"}, "answer": {"type": "integer"}}
    schema = constraint({"type": "object", "properties": properties, "required": required})
    assert writes(in_bytes, schema, '{"reason": "r", "answer": 1}')
    assert not writes(in_bytes, schema, '{"answer": 1, "reason": "r"}')


def test_white_space_is_bounded(in_bytes):
    schema = constraint({"type": "object", "properties": {"a": {"type": "integer"}}})
    assert writes(in_bytes, schema, '{\n    "a": 1\n}')
    assert writes(in_bytes, schema, '{ "a" : 1 }')
    for text in ('{ \n\n"a":1}', "{   }", "{\n" + " " * 41, " {}", "\n{}"):
        assert not writes(in_bytes, schema, text)


def test_the_end_of_the_document_ends_the_answer(in_bytes):
    matcher = in_bytes.start(constraint({"type": "object"}))
    for token in b"{}":
        assert not matcher.finished
        matcher.accept(token)
    assert matcher.finished
    number = in_bytes.start(constraint({"type": "integer"}))
    number.accept(ord("4"))
    assert not number.finished  # 42 may follow
