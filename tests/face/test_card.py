"""The card says what a user of the file must know, and is Markdown and front matter that no name can break."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from markdown_it import MarkdownIt

from flyweight.face.card import card

sample = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sample.py"))))
Page, assert_says, shape = sample.Page, sample.assert_says, sample.shape
ALL = {"classification": sample.classification, "embedding": sample.embedding, "hostile": sample.hostile}
CARD_TAGS = set(re.findall(r"\S+", "h1 h2 p strong em a code pre table thead tbody tr th td ul li"))


def front_matter(text: str) -> list[str]:
    assert text.startswith("---\n")
    return text[4 : text.index("\n---\n", 4)].split("\n")


@pytest.mark.parametrize("name", ALL)
def test_the_front_matter_is_plain_keys_and_quoted_values(name):
    lines = front_matter(card(ALL[name]()))
    assert lines[0] == "library_name: onnx"
    for line in lines:
        for quoted in re.findall(r'"(?:[^"\\]|\\.)*"', line):
            json.loads(quoted)  # a JSON string is a YAML string
        bare = re.sub(r'"(?:[^"\\]|\\.)*"', "Q", line)
        assert re.fullmatch(r" *(- )?([\w-]+:( (Q|onnx|\{[\w:, .-]*\}))?|Q|\{[\w:, .-]*\})", bare), bare


def rendered(text: str) -> str:
    """The card as a Markdown reader shows it that trusts HTML."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text[text.index("\n---\n", 4) + 5 :])


def test_the_card_makes_no_markup_from_names():
    honest, poisoned = (rendered(card(make())) for make in (sample.classification, sample.hostile))
    assert shape(poisoned) == shape(honest)  # the same tables, row by row and cell by cell
    page = Page(poisoned)
    assert {tag for tag, _ in page.elements} <= CARD_TAGS
    assert [a["href"] for tag, a in page.elements if tag == "a"] == ["#how-it-was-made"]
    assert not set(card(sample.hostile())) & set("\x00\x1b\u202e\u2066")
    assert_says(page.text, "</script><img src=x onerror=alert(1)>", "[link](http://evil.example)|`$x^2$`")


def test_the_card_says_what_a_user_of_the_file_must_know():
    results = sample.classification()
    text = card(results)
    assert_says(text, "Budget not met", 'InferenceSession("model.onnx")', results.command, "flyweight verify out")
    assert_says(text, *(c.name for c in results.claims), *(n.text for n in results.notes), results.artifact.sha256)
    assert_says(text, *results.versions.values(), *(d.site.name for d in results.decisions), "93.31 %")


def test_a_command_with_backticks_stays_inside_its_fence():
    results = msgspec.structs.replace(sample.classification(), command="echo\n```\n# no heading")
    tokens = MarkdownIt("commonmark").parse(card(results))
    assert [t.content for t in tokens if t.type == "fence"][-1] == "echo\n```\n# no heading\n"
