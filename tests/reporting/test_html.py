import re
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from cae2pipe.reporting.html import Html, element, image, join_html, page, table

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Collects text and tags; fails where tags do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\r\0", exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"]))
)
def test_any_text_comes_back_as_it_was(text):
    reader = read(element("p", text, title=text))
    assert reader.text == text
    assert reader.tags == [("p", {"title": text})]


def test_markup_is_kept_and_text_escaped():
    assert element("b", Html("<i>x</i>"), "<i>") == "<b><i>x</i>&lt;i&gt;</b>"
    assert element("a", "x", class_="big", data_of=3, href=None) == '<a class="big" data-of="3">x</a>'
    assert join_html(["<", Html("<br />"), None]) == "&lt;<br />"
    assert isinstance(join_html(["a"]), Html)


def test_a_script_in_a_name_stays_text():
    reader = read(page("<script>alert(1)</script>", table(["a"], [["<script>"], ["b"]])))
    assert not [tag for tag, _ in reader.tags if tag == "script"]
    assert "alert(1)" in reader.text


def test_a_page_is_whole_and_stands_alone():
    text = page("title", element("p", image("data:image/png;base64,AAAA", 'a "view"')))
    reader = read(text)
    assert text.startswith("<!doctype html>")
    assert ("img", {"src": "data:image/png;base64,AAAA", "alt": 'a "view"'}) in reader.tags
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"https?://|url\(|@import|<link|<script", text)
