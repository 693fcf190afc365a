"""MkDocs' hook: pages from outside docs/, links, formulas and the search.

MkDocs calls the functions by their names, see https://www.mkdocs.org/user-guide/plugins/#events.
"""

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from scripts.site.formulas import with_mathml
from scripts.site.links import ROOT, Links


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that stand elsewhere in the checkout."""
    links = Links.of(ROOT)
    for source, target in links.pages.items():
        if not source.startswith("docs/"):
            files.append(File.generated(config, target, content=(ROOT / source).read_text()))
    for source in links.files:
        files.append(File.generated(config, source, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to the site's pages.

    Args:
        markdown: text of the page.
        page: says where its links lead from.
        config: is not used.
        files: are not used.
    """
    return Links.of(ROOT).rewritten(markdown, page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML, which browsers draw without a script.

    Args:
        html: the page's text as HTML.
        page: is not used.
        config: is not used.
        files: are not used.
    """
    return with_mathml(html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Take the script of a page's search from this site.

    Args:
        output: the whole page.
        page: is not used.
        config: is not used.
    """
    return _with_our_search(output)


def on_post_template(output: str, template_name: str, config: MkDocsConfig) -> str:
    """Take the script of the search on the page for errors from this site.

    Args:
        output: the whole page.
        template_name: is not used.
        config: is not used.
    """
    return _with_our_search(output)


def _with_our_search(html: str) -> str:
    """Replace the theme's script for search without a server, because it comes from elsewhere.

    All pages stand in one folder, so the script's place is the same for each.
    """
    return re.sub(
        r'<script src="https://[^"]*"></script>', '<script src="search.js"></script>', html
    )
