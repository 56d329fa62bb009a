"""What is done to a grammar or JSON schema before llama.cpp sees it."""

import json
import random
import subprocess
import sys
import time

import llama_cpp.llama_cpp as llama
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.errors import GrammarError, UsageError
from abcli.grammar import gbnf, gbnf_rules
from abcli.grammar.check import check
from abcli.sampling import SamplingConfig
from tests.conftest import REPOSITORY
from tests.native.common import accepted_by_llama_cpp


def refusal(text):
    with pytest.raises(GrammarError) as caught:
        gbnf.check(text)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value.message


GOOD = [
    'root ::= "a"',
    "root ::=",
    'root ::= | "a"',
    '# comment\n\nroot ::= # why\n  "a" # because\nb::=root',
    'root ::= "a" |\n "b"\n\n',
    'root ::= (\n "a" # one\n | \n "b"\n)\r\nb ::= [a-z]\rc ::= .',
    'root ::= "\\x41\\u00e9\\U0001F600\\t\\r\\n\\\\\\"\\[\\]\\-" [^\\]\\-"a-] [-+*/] [a-] [é-ü] "\n"',
    'root ::= "a"* b+ (b | "c")? b{3} b{2,} b{0,3} b{1,2}\nb ::= "b"',
    'root ::= ("a"?)* x*\nx ::= [ ]*',
    "root ::= a-b-1\na-b-1 ::= [0-9]{1,15}",
    'root ::= "a" root "b" | ""',
    'root ::= "" | [] | [^]',
    'root ::= "x"{0} "y"',
    "root ::= " + "(" * 300 + '"a"' + ")" * 300,
    "root ::= [a]{2000}",
    'root ::= "{" p ("," p)* "}"\np ::= "\\"" [a-z]+ "\\":" v\nv ::= root | [0-9]+ | "[" (v ("," v)*)? "]"',
]


@pytest.mark.parametrize("text", GOOD)
def test_good_grammars_pass_here_and_in_llama_cpp(model, text):
    gbnf.check(text)
    assert accepted_by_llama_cpp(model, text)
    assert check(SamplingConfig(grammar=text)) == ()


SYNTAX = [
    ("root", 1, "'::=' is missing"),
    ("root = [a]", 1, "cannot read '= [a]'"),
    ("\n\nroot ::= [a] )", 3, "unexpected ')'"),
    ('root ::= ("a"\n', 1, "never closed"),
    ('root ::= "a\nb', 1, "cannot read '\"a'"),
    ('root ::= "a\nb"\nx ::= [a', 3, "cannot read '[a'"),
    ('root ::= "\\q"', 1, "cannot read"),
    ('root ::= "\\x1"', 1, "cannot read"),
    ("root ::= *", 1, "nothing that '*'"),
    ('root ::= ""+', 1, "nothing that '+'"),
    ("root ::= [a] | ?", 1, "nothing that '?'"),
    ("root ::= [a]{", 1, "cannot read '{'"),
    ("root ::= [a]{,3}", 1, "cannot read"),
    ("root ::= [a]{3,2}", 1, "ends before it begins"),
    ('root ::= "a"\n | "b"', 2, "should start"),
    ('root ::= "a" b ::= "c"', 1, "unexpected '::='"),
    ('root ::= "a"\n::= "b"', 2, "should start"),
    ('root\n::= "b"', 2, "should start"),
    ('a b ::= "x"', 1, "should start"),
    ('root ::= "a"\nroot ::= "b"', 2, "defined twice"),
    ("root ::= a_b", 1, "cannot read '_b'"),
    ('root ::= "a"\0', 1, "cannot read"),
    ('root ::= "a" <|im_end|>', 1, "tokens like <|im_end|>"),
    ('root ::= "a" !<[7]>', 1, "tokens like !<[7]>"),
    ("root ::= [a]{2001}", 1, "too often"),
    ("root ::= [a]{0,100000000}", 1, "too often"),
    ("root ::= [a]{99999999999999999999999}", 1, "too often"),
    ("root ::= [a]{1" + "0" * 10_000 + "}", 1, "too often"),
    ("root ::= ([a]{100}){100}", 1, None),
    ("root ::= [a]{100}{100}", 1, "more than 2000"),
    ("root ::= " + "(" * 1002 + '"a"' + ")" * 1002, 1, "more than 1000 parentheses"),
    ("root ::= " + "(" * 100_000, 1, "more than 1000 parentheses"),
    ('root ::= "' + "a" * 1000 + '"{2000}', 1, "200,000 elements"),
    ("root ::= a\na ::= [a]{0,2000}\nb ::= " + "([a] [b] [c] [d]){0,200} " * 300, 3, "200,000 elements"),
]


@pytest.mark.parametrize(("text", "line", "what"), SYNTAX, ids=range(len(SYNTAX)))
def test_mistakes_are_named_with_their_line(text, line, what):
    if what is None:  # a group is a rule of its own: its repetitions do not multiply
        gbnf.check(text)
        return
    message = refusal(text)
    assert f"line {line}" in message
    assert what in message


STRUCTURE = [
    ("", "no rule 'root'"),
    ("# nothing", "no rule 'root'"),
    ("b ::= [a]", "no rule 'root'"),
    ('root ::= "a"\nb ::= c', "line 2 of the grammar uses the rule 'c'"),
    ('root ::= root "a" | "b"', "'root' of the grammar begins with itself"),
    ('root ::= a "x"\na ::= b\nb ::= a "y" | root "z" | "c"', "begins with itself"),
    # llama.cpp takes these, and expands them without end or aborts:
    ('root ::= a root "z" | "y"\na ::= b\nb ::= "" | "x"', "'root' of the grammar begins with itself"),
    ('root ::= (a? root) "z" | "y"\na ::= "a"', "begins with itself"),
    ('root ::= "k" a\na ::= x a\nx ::= y\ny ::= ""', "'a' of the grammar never comes to a character"),
    ("root ::= a\na ::= root", "never comes to a character"),
    # Exponentially many beginnings:
    (
        "root ::= r0\n" + "".join(f'r{i} ::= r{i + 1} "a" | r{i + 1} "b"\n' for i in range(40)) + 'r40 ::= "x"',
        "more than 10,000 ways",
    ),
    (
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} | r{i + 1}\n" for i in range(40)) + 'r40 ::= "x"',
        "more than 10,000 ways",
    ),
    ('root ::= "x" ' + "(" * 14 + '"a"' + '? | "b")?' * 14 + "".join(f" o{i}" for i in range(9)), "'o0'"),
    (
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(3000)) + 'r3000 ::= "x"',
        "more than 2000 rules",
    ),
    # A single token would take minutes:
    ('root ::= ("a"?){0,400} "b"', "more than 64 parts after each other that may all be empty"),
    ("root ::= [a]\n# \ud800", "not valid Unicode"),
    ("root ::= [a]\n#" + "x" * gbnf.MAX_BYTES, "1,048,5"),
]


@pytest.mark.parametrize(("text", "what"), STRUCTURE, ids=range(len(STRUCTURE)))
def test_unfit_rules_are_named(text, what):
    assert what in refusal(text)


def test_many_beginnings_behind_a_text_are_found():
    ways = " | ".join(f'r0 "{i}"' for i in range(200))
    text = f'root ::= "x" a a\na ::= | {ways}\nr0 ::= ' + " | ".join(f'"{i}"' for i in range(30))
    assert "more than 10,000 ways" in refusal(text)


def test_the_largest_grammars_are_checked_in_a_second():
    started = time.process_time()
    size = gbnf.MAX_BYTES - 1000
    long_text = 'root ::= "' + "a" * 150_000 + '"'
    many_rules = "root ::= x0 [a]\n" + "".join(f"x{i} ::= [a] x{i + 1}\n" for i in range(30_000))
    gbnf.check(long_text)
    gbnf.check(many_rules + 'x30000 ::= "x"')
    refusal(many_rules)
    refusal("root ::= " + "([a]" * (size // 4))
    refusal("root ::= " + "[a]{2000}" * (size // 9))
    refusal("root ::= " + "a " * (size // 2))
    assert time.process_time() - started < 8


def random_grammar(source):
    names = ["root", *(f"r{i}" for i in range(source.randint(0, 4)))]

    def item(depth):
        if depth < 3 and source.random() < 0.25:
            return "(" + alternatives(depth + 1) + ")"
        return source.choice(['"a"', '"ab"', "[a-c]", "[^x]", ".", '"é"', *names])

    def sequence(depth):
        marks = ["", "", "", "*", "+", "?", "{2}", "{0,2}", "{1,}"]
        return " ".join(item(depth) + source.choice(marks) for _ in range(source.randint(0, 3)))

    def alternatives(depth):
        return " | ".join(sequence(depth) for _ in range(source.randint(1, 3)))

    return "\n".join(f"{name} ::= {alternatives(0)}" for name in names)


def test_random_grammars_that_pass_do_not_crash_llama_cpp(tiny_model):
    """In a process of its own: a crash there is a failure here."""
    texts = []
    for seed in range(1500):
        text = random_grammar(random.Random(seed))
        try:
            gbnf.check(text)
        except GrammarError:
            continue
        texts.append(text)
    assert len(texts) > 300
    program = (
        "import json, sys\n"
        "import llama_cpp.llama_cpp as llama\n"
        "from pathlib import Path\n"
        "from abcli.config import ModelConfig\n"
        "from abcli.gguf.checked import check_model\n"
        "from abcli.native.model import Model\n"
        "made = 0\n"
        "with Model(check_model(ModelConfig(Path(sys.argv[1])))) as model:\n"
        "    for text in json.load(sys.stdin):\n"
        "        handle = llama.llama_sampler_init_grammar(model.vocabulary, text.encode(), b'root')\n"
        "        made += bool(handle)\n"
        "        llama.llama_sampler_free(handle)\n"
        "print(made)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tiny_model)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=REPOSITORY,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    # The rest is left recursion that does not grow, which llama.cpp refuses itself.
    assert int(result.stdout) > 0.5 * len(texts)


@given(st.text(alphabet='root:=ab"[]()|*+?{}1,.\n #\\-^<>!é', max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_checked_or_refused(model, text):
    text = "root ::= " + text
    try:
        gbnf.check(text)
    except GrammarError:
        return
    handle = llama.llama_sampler_init_grammar(model.vocabulary, text.encode(), b"root")
    llama.llama_sampler_free(handle)


def test_neither_or_both():
    assert check(SamplingConfig()) == ()
    with pytest.raises(UsageError, match="both"):
        check(SamplingConfig(grammar="root ::= [a]", json_schema="{}"))
    with pytest.raises(GrammarError, match="no rule 'root'"):
        check(SamplingConfig(grammar=" "))


def test_limits_are_llama_cpps():
    assert gbnf.MAX_REPETITIONS == 2000
    assert gbnf_rules.MAX_CHAIN >= gbnf.MAX_REPETITIONS
