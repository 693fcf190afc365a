"""Each command of the documents is read by the program that it names, and its overrides compose.

Nothing runs: what would train, open a run or start a program is replaced. A block with a command of
another program needs a mark with a reason, ``<!-- not run: ... -->``, because no test runs it.
"""

import re
import shlex
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fedpeft import cli
from fedpeft.commands import model as of_models
from fedpeft.commands import planning, saved
from fedpeft.commands import run as of_runs
from fedpeft.config.compose import changed, composed
from fedpeft.config.load import load_config
from fedpeft.config.sweeps import SweepPlan
from fedpeft.deployment import node, server, trial
from fedpeft.reporting.clients import ClientTable
from fedpeft.reporting.listing import Listing
from fedpeft.reporting.partition import Holdings
from fedpeft.reporting.study import Study
from fedpeft.simulation import ahead, launch
from tests.conftest import ROOT
from tests.docs.documents import DOCUMENTS, Block, inline_commands, shell_blocks

BLOCKS = shell_blocks()
Words = tuple[str, ...]


class Understood(Exception):
    """A command was read to the point where its work begins."""


def understood(*_: Any, **__: Any) -> NoReturn:
    raise Understood


def loaded(overrides: list[str], *_: Any) -> NoReturn:
    load_config(overrides)
    raise Understood


def swept(plan: SweepPlan, *_: Any) -> NoReturn:
    for overrides in plan.jobs:
        load_config(overrides)
    raise Understood


def planned(study: Study, run_all: Any) -> NoReturn:
    """Compose each method of a study once, because seeds and rates are numbers already."""
    runs = replace(study, lrs=study.lrs[:1], seeds=study.seeds[:1]).runs()
    loaded(runs[0].overrides)


def checked(runs: list[list[str]]) -> NoReturn:
    """Compose each entry of each table once."""
    rest = {tuple(o for o in run if not o.startswith(("seed=", "run_dir="))): run for run in runs}
    for overrides in rest.values():
        load_config(overrides)
    raise Understood


def estimated(studies: list[Study], *_: Any) -> NoReturn:
    planned(studies[0], None)


def counted(names: list[str], base: list[str]) -> NoReturn:
    loaded([*base, f"method={names[0]}"])


def opened(path: Path, overrides: list[str], *_: Any, **__: Any) -> NoReturn:
    changed(composed([]), overrides)
    raise Understood


def parsed_by(module: Any) -> Callable[[list[str]], NoReturn]:
    def main(arguments: list[str]) -> NoReturn:
        given: Namespace = module.parse(arguments)
        loaded(getattr(given, "overrides", []))

    return main


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Replace what commands do by ``understood``, after their words are read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDPEFT_TRACEBACK", "1")  # errors come out of main
    for owner, name, stand_in in (
        (launch, "run", loaded),
        (of_runs, "sweep", swept),
        (Listing, "of", understood),
        (saved, "write_report", understood),
        (saved, "chosen_runs", understood),
        (planning, "_counts", counted),
        (ahead, "check_all", checked),
        (Study, "finish", planned),
        (ClientTable, "of", understood),
        (Holdings, "of", understood),
        (of_models, "open_run", opened),
        *((module, "main", parsed_by(module)) for module in (node, server, trial)),
        (Path, "is_file", lambda path: True),  # files of the reader's
        (Path, "is_dir", lambda path: True),
    ):
        monkeypatch.setattr(owner, name, stand_in)
    monkeypatch.setattr(of_models, "is_exported", lambda path: False)
    monkeypatch.setattr("fedpeft.simulation.estimate.show_estimate", estimated)
    monkeypatch.setattr("fedpeft.server.check.check", lambda grid, words, simulated: loaded(words))


# Files that docs/extending.md tells the reader to write; tests/docs/test_pages.py has them.
WRITTEN = {"method=settling_lora", "data=tickets", "strategy=slowing"}


def in_sentences() -> list[Any]:
    """Return the distinct commands in the documents' sentences."""
    places = {tuple(words[1:]): name for name in DOCUMENTS for words in inline_commands(name)}
    return [pytest.param(w, id=place) for w, place in places.items() if not WRITTEN & {*w}]


def commands_of(program: str) -> list[Any]:
    """Return the distinct commands of a program, each with the place of its first."""
    places: dict[Words, str] = {}
    for block in BLOCKS:
        for words in block.commands:
            if words[0] == program:
                places.setdefault(tuple(words[1:]), f"{block.document}:{block.line}")
    return [pytest.param(words, id=place) for words, place in places.items()]


@pytest.mark.parametrize("words", commands_of("fedpeft") + in_sentences())
def test_fedpeft_understands(
    words: Words, nothing_runs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["fedpeft", *words])
    with pytest.raises(Understood):
        cli.main()


@pytest.mark.parametrize("words", commands_of("flwr"))
def test_overrides_of_flwr_run_compose(words: Words) -> None:
    if words[0] == "run":
        given = words[words.index("--run-config") + 1]
        found = re.fullmatch(r'overrides="(.*)"', given)
        assert found is not None
        load_config(shlex.split(found.group(1)))
    else:
        assert words[0] == "supernode"


@pytest.mark.parametrize("words", commands_of("make"))
def test_make_knows(words: Words) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{word}:", makefile, re.MULTILINE) for word in words if "=" not in word)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"{b.document}:{b.line}" for b in BLOCKS])
def test_other_commands_are_marked(block: Block) -> None:
    others = {words[0] for words in block.commands} - {"fedpeft", "make"}
    if block.reason is None:
        assert not others, f"mark the block, <!-- not run: reason -->: no test runs {others}"
    else:
        assert len(block.reason.split()) >= 3, "say why it is not run"


def test_documents_have_commands() -> None:
    """No command is lost by a change of how blocks are found."""
    fences = sum(
        len(re.findall(r"^ *```(?:bash|sh|shell|console)$", (ROOT / d).read_text(), re.MULTILINE))
        for d in {b.document for b in BLOCKS}
    )
    assert len(BLOCKS) == fences > 20
    assert len(commands_of("fedpeft")) > 30
