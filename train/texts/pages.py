"""The text of an HTML page, as a reader sees it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_BLOCKS = {"p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "tr", "table", "pre"}
_UNREAD = ("navheader", "navfooter", "toc")
"""Classes of what stands around a page of a DocBook manual."""


def page_text(html: str) -> str:
    """Paragraphs with an empty line between them; `<pre>` as it is."""
    page = _Page()
    page.feed(html)
    page.close()
    return page.text


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self._paragraphs: list[str] = []
        self._current = ""
        self._verbatim = 0
        self._unread: str | None = None
        """The tag that nothing is read within, and how many of its kind are open."""
        self._depth = 0

    @property
    def text(self) -> str:
        self._end_paragraph()
        return "\n\n".join(self._paragraphs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._unread is not None:
            self._depth += tag == self._unread
            return
        classes = (dict(attrs).get("class") or "").split()
        if tag in ("head", "script", "style") or not set(_UNREAD).isdisjoint(classes):
            self._unread, self._depth = tag, 1
            return
        if tag in _BLOCKS and not self._verbatim:
            self._end_paragraph()
        self._verbatim += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br":
            self.handle_data("\n" if self._verbatim else " ")

    def handle_endtag(self, tag: str) -> None:
        if self._unread is not None:
            self._depth -= tag == self._unread
            if not self._depth:
                self._unread = None
            return
        if tag in _BLOCKS and (tag == "pre" or not self._verbatim):
            self._end_paragraph()
        self._verbatim -= tag == "pre"

    def handle_data(self, data: str) -> None:
        if self._unread is None:
            self._current += data

    def _end_paragraph(self) -> None:
        text = self._current.strip("\n") if self._verbatim else re.sub(r"\s+", " ", self._current)
        if text.strip():
            self._paragraphs.append(text.rstrip() if self._verbatim else text.strip())
        self._current = ""
