"""The page of a trace: small, safe whatever the texts are, and complete without a network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from abcli.trace.page import bucket_names, trace_page
from abcli.trace.trace import MAX_PASSAGES, passages_of
from tests.trace.samples import made_trace

NASTY = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", '" onfocus="alert(1)', "{{ 7*7 }}"]
texts = st.lists(
    st.one_of(st.sampled_from([*NASTY, "]]>", "<!--", "&lt;", "\\u003c"]), st.text(max_size=12)), min_size=1
)


class Reader(HTMLParser):
    """Collects the elements of a page, and the text of its scripts and tokens."""

    def __init__(self):
        super().__init__()
        self.elements, self.attributes, self.scripts, self.styles = [], [], [], []
        self.inside = None

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data


def read(page):
    reader = Reader()
    reader.feed(page)
    return reader


@given(texts, texts, st.text(max_size=20))
def test_texts_stay_texts(prompt, answer, model):
    page = trace_page(made_trace(prompt, answer, model=model))
    reader = read(page)
    plain = read(trace_page(made_trace(["a"] * len(prompt), ["b"] * len(answer))))
    assert len(reader.scripts) == 2
    assert set(reader.elements) <= set(plain.elements)
    assert reader.scripts[1] == plain.scripts[1]
    names = {name for name, _value in reader.attributes}
    assert not any(name.startswith("on") for name in names)
    assert names.isdisjoint({"src", "href", "style", "srcset", "action"})
    data = json.loads(reader.scripts[0])
    shown = [text.replace("\n", "↵") or "·" for text in answer]
    assert [step["views"][-1]["candidates"][0][1] for step in data["steps"]][1:2] == [
        text if index % 5 != 4 else f"{text}!" for index, text in enumerate(shown)
    ][1:2]


def test_a_page_loads_nothing():
    page = trace_page(made_trace(NASTY * 20, NASTY * 3))
    assert "http:" not in page
    assert "https:" not in page
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src &#39;none&#39;")
    assert "unsafe" not in policy


def test_a_long_text_stays_small():
    prompt = [" word", " another", "."] * 1333 + ["\n"]
    page = trace_page(made_trace(prompt, [" answer"] * 200, buckets=6))
    assert len(prompt) == 4000
    assert len(page.encode()) < 2_000_000


def test_a_trace_without_attention_says_why():
    page = trace_page(made_trace(["a", "b"], ["c"], attention=False))
    assert "no weights" in page
    assert trace_page(made_trace(["a", "b"], []))


def test_a_set_without_the_native_base_does_not_claim_to_have_it():
    assert bucket_names((5e3, 1e4, 2e4), 1e4, 1) == ["0.5×", "1× (native)", "2×"]  # noqa: RUF001 - times
    assert bucket_names((7e3, 2e4), 1e4, 0) == ["0.7× (nearest to native)", "2×"]  # noqa: RUF001 - times


@given(st.lists(st.sampled_from([".", " a", "\n", "x.", "?"]), min_size=1, max_size=2000))
def test_passages_cover_a_text_in_order(tokens):
    passages = passages_of(tokens)
    assert passages[0][0] == 0
    assert passages[-1][1] == len(tokens)
    assert all(first[1] == second[0] for first, second in pairwise(passages))
    assert all(start < end for start, end in passages)
    assert len(passages) <= MAX_PASSAGES
