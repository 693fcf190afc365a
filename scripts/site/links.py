"""Links between documents of the checkout, as links between pages of the site.

In the checkout a link names a file relative to its document, so that it works where the sources are
read. The site has other places for README.md and CONTRIBUTING.md, and copies of linked files.
"""

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "deploy/README.md": "deploy.md",
    "results/README.md": "answers.md",
    "results/fedtt_table1/README.md": "fedtt_table1.md",
    "results/fedtt_table2/README.md": "fedtt_table2.md",
    "results/fedtt_table3/README.md": "fedtt_table3.md",
    "results/scl_table1/README.md": "scl_table1.md",
    "results/scl_table2/README.md": "scl_table2.md",
}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Links:
    """The documents of a checkout, and what they link.

    Args:
        root: the checkout.
        pages: place in the site of each document, by its path in the checkout.
    """

    root: Path
    pages: Mapping[str, str]

    @classmethod
    @cache
    def of(cls, root: Path) -> "Links":
        """Find the documents of a checkout."""
        inside = {f"docs/{p.name}": p.name for p in sorted((root / "docs").glob("*.md"))}
        return cls(root, OUTSIDE | inside)

    @property
    def files(self) -> list[str]:
        """Files that documents link and that are no documents of the site, by path."""
        linked = {
            path
            for source in self.pages
            for path in self._linked(source)
            if path not in self.pages and not path.startswith("docs/")
        }
        return sorted(linked)

    def _linked(self, source: str) -> Iterator[str]:
        for text in _CODE.split((self.root / source).read_text())[::2]:
            for link in _LINK.finditer(text):
                yield _resolved(source, link.group(1))

    def rewritten(self, markdown: str, page: str) -> str:
        """Return a document's text with links between pages of the site.

        Args:
            markdown: the text.
            page: place in the site; a page that is generated has none in the checkout and stays.
        """
        source = next((s for s, target in self.pages.items() if target == page), None)
        if source is None:
            return markdown

        def moved(link: re.Match[str]) -> str:
            path = _resolved(source, link.group(1))
            target = self.pages.get(path, path.removeprefix("docs/"))
            return posixpath.relpath(target, posixpath.dirname(page) or ".") + (link.group(2) or "")

        parts = _CODE.split(markdown)
        parts[::2] = [_LINK.sub(moved, part) for part in parts[::2]]
        return "".join(parts)


def _resolved(source: str, link: str) -> str:
    """Return a link's path in the checkout."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
