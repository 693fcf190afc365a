"""The page of all configuration keys, computed from ``conf/`` and the classes that it names.

    python -m scripts.site.configuration

writes ``docs/configuration.md``, which is committed, because who reads a checkout has no site.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import OmegaConf

from fedpeft.config.compose import CONF, GROUPS
from fedpeft.config.runtime import Runtime
from fedpeft.config.schema import Settings
from scripts.site.keys import Key, keys_of, summary, written

INTRODUCTION = """# Configuration

A key is set on the command line, `fedpeft run lr=1e-3 method.rank=4`, and a group is chosen by its
name, `fedpeft run method=fedtt strategy=fedprox`. The file `conf/config.yaml` has all keys with
their defaults but `lr` and `personal`, which the files of methods set, and a folder `conf/GROUP`
has one file for each choice. This page is computed from these files and from the classes that they
name: *allowed* is what the code itself says when it refuses another value.
"""
PAGE = Path(__file__).parents[2] / "docs/configuration.md"
HEADER = "| key | type | default | allowed | meaning |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Choice:
    """One file of a group.

    Args:
        group: the group's name, such as ``method``.
        path: path of the YAML file.
    """

    group: str
    path: Path

    @cached_property
    def tree(self) -> dict[str, Any]:
        """All that the file sets."""
        tree = OmegaConf.to_container(OmegaConf.load(self.path), resolve=False)
        assert isinstance(tree, dict)
        return {str(key): value for key, value in tree.items()}

    @property
    def name(self) -> str:
        """Name on the command line."""
        return self.path.stem

    @property
    def values(self) -> dict[str, Any]:
        """Keys of the group's class; a method's YAML has them one level down."""
        values = self.tree.get(self.group, self.tree)
        return {key: value for key, value in values.items() if key != "_target_"}

    @property
    def others(self) -> dict[str, Any]:
        """Keys outside the group's class, such as ``lr``."""
        if self.group not in self.tree:
            return {}
        return {k: v for k, v in self.tree.items() if k not in (self.group, "defaults")}

    @property
    def cls(self) -> type:
        """The class that the file builds."""
        target = self.tree.get(self.group, self.tree).get("_target_")
        return get_class(target) if target else Runtime

    @property
    def comment(self) -> str:
        """The comment at the head of the file."""
        lines = [line for line in self.path.read_text().splitlines() if line.strip()]
        head: list[str] = []
        for line in lines:
            if not line.startswith("#"):
                break
            if "@package" not in line:
                head.append(line.lstrip("# "))
        return " ".join(head)


def page() -> str:
    """Return the page as Markdown."""
    parts = [INTRODUCTION, *_settings()]
    for group in (*GROUPS, "runtime"):
        parts += _group(group)
    return "\n".join([*parts, *_experiments()]) + "\n"


def choices(group: str) -> list[Choice]:
    """Return the files of a group, sorted by name."""
    return [Choice(group, path) for path in sorted((CONF / group).glob("*.yaml"))]


def _settings() -> Iterator[str]:
    tree = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"), resolve=False)
    assert isinstance(tree, dict)
    nested = {f.name: f.type for f in fields(Settings) if is_dataclass(f.type)}
    values = {str(key): value for key, value in tree.items() if key not in nested}
    yield "## Keys of every run\n"
    yield (
        "Each method's YAML sets `lr`, and that of `fedsa_lora` sets `personal`; here are the "
        "values without it.\n"
    )
    yield from _table("", keys_of(Settings, values, frozenset(nested)))
    for name, cls in nested.items():
        if name == "runtime":  # a group
            continue
        assert isinstance(cls, type)
        yield f"\n## {name}\n\n{_text(summary(cls))}\n"
        yield from _table(f"{name}.", keys_of(cls, tree[name]))


def _group(group: str) -> Iterator[str]:
    by_class: dict[type, list[Choice]] = {}
    for choice in choices(group):
        by_class.setdefault(choice.cls, []).append(choice)
    yield f"\n## {group}\n"
    common = _common(group, by_class)
    if common:
        yield f"Keys of every `{group}=`:\n"
        yield from _table(f"{group}.", common.values())
    for cls, of_class in by_class.items():
        names = ", ".join(choice.name for choice in of_class)
        title = names if len(of_class) < 4 else cls.__name__
        yield f"\n### {group}={title}\n\n`{cls.__module__}.{cls.__name__}`: {_text(summary(cls))}\n"
        values = of_class[0].values if len(of_class) == 1 else {}
        keys = keys_of(cls, values)
        yield from _table(f"{group}.", [key for key in keys if key != common.get(key.name)])
        yield ""
        yield from _sets(of_class)


def _common(group: str, by_class: Iterable[type]) -> dict[str, Key]:
    """Return the keys that all classes of a group have from its base, as the first one has them."""
    base, first = get_class(GROUPS.get(group, "builtins.object")), next(iter(by_class))
    names = {f.name for f in fields(base)} if is_dataclass(base) and first is not base else set()
    return {key.name: key for key in keys_of(first, {}) if key.name in names}


def _sets(of_class: list[Choice]) -> Iterator[str]:
    """Yield what each file sets: all of it where several files share a class."""
    for choice in of_class:
        values = dict(choice.others)
        if len(of_class) > 1:
            values |= {f"{choice.group}.{k}": v for k, v in choice.values.items()}
        settings = ", ".join(
            f"`{key}` (see the file)" if isinstance(value, dict) else f"`{key}={written(value)}`"
            for key, value in values.items()
            if value != {}
        )
        comment = choice.comment.rstrip(".")
        about = [f"{comment}." if comment else "", f"Sets {settings}." if settings else ""]
        if any(about):
            yield f"- `{choice.group}={choice.name}`: {' '.join(filter(None, about))}"


def _experiments() -> Iterator[str]:
    yield "\n## experiment\n\nAn experiment sets keys of the whole configuration.\n"
    for choice in choices("experiment"):
        yield f"### experiment={choice.name}\n\n{choice.comment}\n\n```yaml"
        yield OmegaConf.to_yaml(OmegaConf.load(choice.path)).strip() + "\n```\n"


def _table(prefix: str, keys: Iterable[Key]) -> Iterator[str]:
    rows = list(keys)
    if rows:
        yield HEADER
    for key in rows:
        default = f"`{_cell(key.default)}`" if key.default else "-"
        cells = (f"`{prefix}{key.name}`", key.type, default, _cell(key.rule), _cell(key.meaning))
        yield f"| {_text(' | '.join(cells))} |"


def _text(text: str) -> str:
    """Return a docstring's text as Markdown."""
    return text.replace("``", "`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
