"""Renders the equations of the documentation as MathML when it is built: the pages need neither scripts nor a CDN."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace every equation that arithmatex has marked; called by MkDocs for each page."""

    def render(match: re.Match[str]) -> str:
        tag, bracket, latex = match.groups()
        display = "block" if bracket == "[" else "inline"
        return f'<{tag} class="equation">{convert(html.unescape(latex).strip(), display=display)}</{tag}>'

    return EQUATION.sub(render, content)
