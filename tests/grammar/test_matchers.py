"""What is followed, token by token: regular expressions, Lark grammars, and the guards around llguidance."""

import subprocess
import sys
from dataclasses import replace

import pytest

from abcli.errors import GrammarError, UnsupportedModelError
from abcli.grammar import guidance
from abcli.grammar.guidance import Matcher, Matchers, compile_constraint
from tests.grammar.conftest import BYTES, END, constraint, writes

REGEXES = {
    r"\d{3}-\d{4}": (["555-1234"], ["555-123", "x555-1234", "٣٣٣-1234"]),
    "^yes$|^no$": (["yes", "no"], ["yesno", "maybe"]),
    "a|b+?": (["a", "b", "bbb"], ["ab", ""]),
    "(?i)Stop": (["stop", "STOP"], ["stopp"]),
    "(?<year>[0-9]{4})(?:-[0-9]{2})?": (["2024", "2024-05"], ["2024-5"]),
    r"[^\w]+": (["-!"], ["a", "é", "_"]),
    r"\W\D\S": (["-a!"], ["aaa", "-1!", "-a "]),
    r"[\s\S]+": (["a\nb"], [""]),
    "{a}": (["{a}"], ["a"]),
    r"😀|\u{1F601}|\uD83D\uDE02": (["😀", "😁", "😂"], ["😃"]),
}
BAD_REGEXES = {
    "a(": "never closed",
    "a)": "closes nothing",
    "[a": "never closed",
    "[b-a]": "ends before it begins",
    "*a": "nothing that '*' could repeat",
    "a**": "nothing that '*' could repeat",
    "a{5,2}": "ends before it begins",
    "a{,2}": "different things",
    "a{9999999999}": "repeats too often",
    "(a{1000}){1000}": "repetitions",
    "(?=a)b": "looks ahead",
    r"(a)\1": "repeats what matched before",
    r"\bword\b": "a word's edge",
    r"\q": "not known",
    "\\": "ends with a backslash",
    "a^b": "can only stand at the beginning",
    "a$b": "can only stand at the end",
    "(" * 300 + ")" * 300: "parentheses",
    "[]": "allows no character",
    r"\uD800": "not a character",
    "a" * 100_001: "characters",
    r"\p{Nonsense}": "Unicode property not found",
}


@pytest.mark.parametrize("pattern", REGEXES)
def test_a_regular_expression_is_for_the_whole_answer(in_bytes, pattern):
    matching, others = REGEXES[pattern]
    for text in matching:
        assert writes(in_bytes, constraint(pattern, "regex"), text), text
    for text in others:
        assert not writes(in_bytes, constraint(pattern, "regex"), text), text


@pytest.mark.parametrize("pattern", BAD_REGEXES, ids=range(len(BAD_REGEXES)))
def test_a_bad_regular_expression_is_refused_in_one_line(pattern):
    with pytest.raises(GrammarError) as caught:
        compile_constraint(constraint(pattern, "regex"))
    assert caught.value.message.startswith("the regular expression cannot be used: ")
    assert BAD_REGEXES[pattern] in caught.value.message
    assert "\n" not in caught.value.message


def test_lark_with_a_schema(in_bytes):
    schema = '{"type": "object", "properties": {"x": {"const": "%json {"}}, "additionalProperties": false}'
    grammar = constraint(f'// %json in a comment\nstart: "call: " args "%json"\nargs: %json {schema}\n', "lark")
    assert writes(in_bytes, grammar, 'call: {"x": "%json {"}%json')
    assert writes(in_bytes, grammar, "call: {}%json")
    assert not writes(in_bytes, grammar, "call: {      }%json")  # white space is bounded there, too
    assert not writes(in_bytes, grammar, 'call: {"y": 1}%json')


def test_lark_with_special_tokens(in_bytes):
    matcher = in_bytes.start(constraint('start: "a" <unused> "b"', "lark"))
    for token in (ord("a"), END + 1, ord("b")):
        assert matcher.allows(token)
        matcher.accept(token)
    assert matcher.finished


def test_bad_lark_grammars(in_bytes):
    for text, what in {
        "start: b": 'unknown name: "b"',
        "start: (": "Expected token",
        'start: "a" <nothing>': 'unknown special token: "<nothing>"',
        "start: %json {": "line 1 of the Lark grammar is not JSON",
        'start: %json {"not": {}}': "$.not",
        'start: "a"' + " " * 70_000: "characters",
        'start: "\ud800"': "half a character",
        "start: " + "(" * 20_000 + '"a"' + ")" * 20_000: "nested",
    }.items():
        with pytest.raises(GrammarError) as caught:
            in_bytes.start(constraint(text, "lark"))
        assert what in caught.value.message
        assert "\n" not in caught.value.message
    lenient = compile_constraint(constraint('start: %json {"not": {}}', "lark", lenient=True))
    assert lenient.remarks == ("$.not is not enforced",)


def test_every_end_token_ends_an_answer_and_no_other_special_token_is_ever_allowed():
    matchers = Matchers(replace(BYTES, ends=[END, END + 2], tokens=[*BYTES.tokens, b"\xff<other end>"]), "two ends")
    matcher = matchers.start(constraint("[^]*", "regex"))
    assert matcher.allows(END)
    assert matcher.allows(END + 2)
    mask = matcher.mask()
    assert mask[[END, END + 2]].all()
    assert not matcher.allows(END + 1)
    assert not mask[END + 1]
    matcher.accept(END + 2)
    assert matcher.finished


def test_a_failed_answer_does_not_look_complete():
    class Failed:
        """As llguidance is after an error: it allows what ends an answer, and says nothing."""

        def is_error(self):
            return True

        def is_stopped(self):
            return True

        def get_error(self):
            return "ParserTooComplex\n<non-verbose/>"

        def validate_tokens(self, _tokens):
            return 1

        def compute_bitmask(self):
            return bytes([255] * 40)

        def consume_token(self, _token):
            return True

    matcher = Matcher(Failed(), 300)
    assert not matcher.finished
    for use in (lambda: matcher.allows(END), matcher.mask, lambda: matcher.accept(END)):
        with pytest.raises(GrammarError, match="cannot be continued as the grammar wants it: ParserTooComplex"):
            use()


def test_a_grammar_that_grows_too_complex_ends_in_an_error(in_bytes, monkeypatch):
    from llguidance import LLParserLimits

    monkeypatch.setattr(guidance, "_limits", lambda: LLParserLimits(step_max_items=40, verbose_errors=False))
    monkeypatch.setattr(in_bytes, "_templates", type(in_bytes._templates)())
    matcher = in_bytes.start(constraint('start: a\na: "x" | a a | a a a', "lark"))

    def go_on():
        for _ in range(200):
            matcher.mask()
            matcher.accept(ord("x"))

    with pytest.raises(GrammarError, match="cannot be continued"):
        go_on()


def test_what_has_no_token_to_begin_with_fails_before_any_answer():
    tokens = [b"\xff<not there>" if token == b"\n" else token for token in BYTES.tokens]
    with pytest.raises(GrammarError, match="no token to begin with"):
        Matchers(replace(BYTES, tokens=tokens), "one line").start(constraint("[\n]a", "regex"))


def test_a_vocabulary_that_cannot_be_used():
    with pytest.raises(UnsupportedModelError, match=r"odd\.gguf cannot give structured answers: .* no token that ends"):
        Matchers(replace(BYTES, ends=[]), "odd.gguf")
    tokens = [b"\xff<no brace>" if token == b"{" else token for token in BYTES.tokens]
    with pytest.raises(UnsupportedModelError, match=r"no token for '\{'"):
        Matchers(replace(BYTES, tokens=tokens), "odd.gguf")


def test_each_constraint_is_compiled_once(in_bytes, monkeypatch):
    compiled = []
    compile_really = in_bytes._compile
    monkeypatch.setattr(in_bytes, "_compile", lambda wanted: compiled.append(wanted) or compile_really(wanted))
    for _ in range(3):
        first, second = (in_bytes.start(constraint({"const": value})) for value in ("once", "twice"))
        assert first.allows(ord('"'))
        first.accept(ord('"'))
        assert first.allows(ord("o"))
        assert not second.allows(ord("o"))  # answers know nothing of each other
    assert len(compiled) == 2


def test_what_has_to_come_is_forced_in_the_models_own_tokens():
    tokens = [*BYTES.tokens, b"na", b"me", b"name"]
    name, na = len(tokens) - 1, len(tokens) - 3
    spoken = {"xname": [ord("x"), na, na + 1]}
    for known, first in ((spoken, na), ({}, name)):
        matchers = Matchers(
            replace(BYTES, tokens=tokens, tokenize=lambda text, known=known: known.get(text, [])), "words"
        )
        matcher = matchers.start(constraint("xname(y|z)", "regex"))
        matcher.accept(ord("x"))
        # Where the tokenizer's answer is not the text, the longest tokens are taken.
        assert matcher.mask().nonzero()[0].tolist() == [first]


def test_llguidance_is_loaded_only_when_it_is_needed():
    program = "import sys, abcli.cli.main, abcli.llm; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_system_without_llguidance_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match="llguidance, which structured answers need, cannot be loaded"):
        compile_constraint(constraint("never compiled before", "regex"))


def test_a_chain_of_references_needs_more_than_the_usual_stack():
    """The same without a stack of its own ends the process, so it is tried in another one."""
    program = (
        "import json, sys, threading\n"
        "from abcli.grammar import guidance\n"
        "from abcli.grammar.constraint import Constraint\n"
        "if sys.argv[1] == 'small': guidance.STACK_BYTES = 1 << 20\n"
        "link = lambda i: {'type': 'object', 'properties': {'n': {'$ref': f'#/$defs/a{i + 1}'}}}\n"
        "links = {f'a{i}': link(i) for i in range(3000)}\n"
        "schema = {'$defs': {**links, 'a3000': {}}, '$ref': '#/$defs/a0'}\n"
        "guidance.compile_constraint(Constraint('json_schema', json.dumps(schema)))\n"
    )
    for size, ended in (("large", True), ("small", False)):
        done = subprocess.run([sys.executable, "-c", program, size], check=False, capture_output=True)
        assert (done.returncode == 0) is ended
