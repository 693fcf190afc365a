"""Formulas as MathML, because a script that draws them would come from elsewhere."""

import re
from html import unescape

from latex2mathml.converter import convert

# The output of pymdownx.arithmatex: \(...\) in a span, \[...\] in a div.
_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>',
    re.DOTALL,
)


def with_mathml(html: str) -> str:
    """Return a page's HTML with its formulas as MathML."""
    return _FORMULA.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found.group(1) == "div" else "inline"
    return convert(unescape(found.group(2)).strip(), display=display)
