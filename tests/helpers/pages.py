"""Reads the pages that reports are written as."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Images, text, and whether every element is closed."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, source):
        super().__init__()
        self.images, self.words, self.open, self.tags = [], [], [], []
        self.feed(source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)
