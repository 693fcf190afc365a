"""The site's computed parts (links, formulas, the page of keys), and the built site."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedpeft.config.compose import CONF, GROUPS, composed, leaves
from scripts.site.configuration import PAGE, page
from scripts.site.formulas import with_mathml
from scripts.site.keys import arguments, keys_of
from scripts.site.links import Links
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def configuration() -> str:
    return page()


# --- the page of configuration keys ---------------------------------------------------------------


def test_the_page_is_that_of_today(configuration: str) -> None:
    again = "python -m scripts.site.configuration writes it again"
    assert PAGE.read_text(encoding="utf-8") == configuration, again


def test_every_key_of_a_run_is_there(configuration: str) -> None:
    known = [key for key in leaves(composed([]), resolve=False) if "_target_" not in key]
    keys = [k for k in known if not k.startswith(("hydra.", "model.architecture."))]
    documented = set(re.findall(r"^\| `([\w.]+)` ", configuration, re.MULTILINE))
    assert len(keys) > 40
    assert set(keys) - documented == set()


@pytest.mark.parametrize("group", [*GROUPS, "runtime", "experiment"])
def test_every_choice_is_there(configuration: str, group: str) -> None:
    part = configuration.partition(f"\n## {group}\n")[2].partition("\n## ")[0]
    for path in (CONF / group).glob("*.yaml"):
        assert re.search(rf"\b{path.stem}\b", part), path.stem


@pytest.mark.parametrize(
    "row",
    [
        "| `num_clients` | int | `5` | >= 1; <= 10000000 |",
        "| `runtime.device` | str | `auto` | auto, cpu or cuda |",
        "| `method.bottleneck` | int | `64` | >= 2 |",
        "| `method.targets` | list of str | `[q,v]` | at least one projection |",
        "| `strategy.beta` | float | `0.2` | in (0, 0.5): 0 trims nothing, 0.5 everything |",
        "| `data.prompt` | str | `{{ context }}\\n\\n{{ question }}` |  | Jinja template over",
        "| `data.metrics` | list of str | `[spearman,pearson]` | of spearman, pearson, or a module",
        "| `checkpoint.keep` | int | `2` | >= 1 | number of the last checkpoints that stay. |",
    ],
)
def test_a_row(configuration: str, row: str) -> None:
    assert f"\n{row}" in configuration


def test_every_key_says_what_it_means(configuration: str) -> None:
    rows = re.findall(r"^\| `(\w+\.\w+|\w+)` (?:.*?(?<!\\)\|){4} *(.*?) *\|$", configuration, re.M)
    assert len(rows) > 200
    assert {name for name, meaning in rows if not meaning} == set()


def test_keys_come_from_classes_and_their_rules_from_their_errors() -> None:
    @dataclass
    class Base:
        """A base.

        Args:
            first: a text of
                two lines.
        """

        first: int = 2

        def __post_init__(self) -> None:
            if self.first < 1:
                raise ValueError(f"group.first must be >= 1 and second > 0, got {self.first} and 1")

    @dataclass
    class Derived(Base):
        """More.

        Args:
            second: a name, ``a`` or null.
        """

        second: str | None = None

    first, second = keys_of(Derived, {"first": 3})
    assert (first.type, first.default, first.rule) == ("int", "3", ">= 1")
    assert (second.type, second.default, second.rule) == ("str or null", "null", "")
    assert arguments(Derived) == {
        "first": "a text of two lines.",
        "second": "a name, ``a`` or null.",
    }


# --- links and formulas ---------------------------------------------------------------------------


def test_links_lead_to_the_site_s_pages(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "deploy").mkdir()
    (tmp_path / "docs/a.md").write_text("[r](../README.md#x) [b](b.md) `[c](../no.md)` <a>")
    (tmp_path / "README.md").write_text("[a](docs/a.md) ![p](p.png) [w](https://x.y/z)")
    pages = {"README.md": "index.md", "docs/a.md": "a.md"}
    links = Links(tmp_path, pages)
    assert links.files == ["p.png"]
    assert links.rewritten((tmp_path / "docs/a.md").read_text(), "a.md") == (
        "[r](index.md#x) [b](b.md) `[c](../no.md)` <a>"
    )
    assert links.rewritten((tmp_path / "README.md").read_text(), "index.md") == (
        "[a](a.md) ![p](p.png) [w](https://x.y/z)"
    )


def test_formulas_become_mathml() -> None:
    html = 'x <span class="arithmatex">\\(a &lt; b\\)</span> <div class="arithmatex">\\[c\\]</div>'
    made = with_mathml(html)
    assert made.count("<math") == 2 and "arithmatex" not in made
    assert 'display="inline"' in made and 'display="block"' in made
    assert "<mo>&#x0003C;</mo>" in made  # the sign <, once


# --- the site -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_is_built_and_takes_nothing_from_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text() for path in tmp_path.glob("*.html")}
    for name, html in pages.items():
        taken = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(\w+://[^"]*)', html)
        assert taken == [], name
        assert "arithmatex" not in html, name
    assert pages["methods.html"].count("<math") > 0
    assert (tmp_path / "results/quickstart/comparison.png").is_file()
