"""The pages' code runs as printed, and their tables hold what the code does."""

import json
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import fedpeft
from fedpeft.config.compose import CONF
from fedpeft.config.load import load_config
from fedpeft.engine.roles import Roles
from fedpeft.methods.base import At, Round
from fedpeft.state import TRAINED as TRAINS
from fedpeft.state import Role
from tests.conftest import ROOT
from tests.docs.documents import blocks, page, table
from tests.expected.methods import TINY

EXTENDING = "docs/extending.md"
METHOD, STRATEGY = "fedpeft.methods.settling_lora", "fedpeft.algorithms.slowing"


def code(language: str) -> list[str]:
    """Return the blocks of a language of the page on extensions."""
    return [block.text for block in blocks(EXTENDING) if block.language == language]


def module(name: str, number: int) -> Iterator[ModuleType]:
    """Import one of the page's Python blocks as the module that the page calls it."""
    assert find_spec(name) is None  # no module of the tree
    assert f"`{name.replace('.', '/')}.py`" in page(EXTENDING)
    made = ModuleType(name)
    sys.modules[name] = made
    exec(compile(code("python")[number], f"{EXTENDING} {number}", "exec"), made.__dict__)
    yield made
    del sys.modules[name]


@pytest.fixture
def method() -> Iterator[ModuleType]:
    yield from module(METHOD, 0)


@pytest.fixture
def strategy() -> Iterator[ModuleType]:
    yield from module(STRATEGY, 1)


def test_the_method_settles_and_aggregates_exactly_from_there_on(
    method: ModuleType, run: Any
) -> None:
    fields = ["method=lora", "method.rank=4", f"method._target_={METHOD}.SettlingLoRA"]
    fields += ["+method.settled_after=1"]
    settling = load_config(fields).method
    assert type(settling) is method.SettlingLoRA
    a, b = "x.lora_A.default.weight", "x.lora_B.default.weight"
    assert [settling.role(a, At(t)) for t in (1, 2, 3)] == [Role.SHARED, Role.FROZEN, Role.FROZEN]
    assert [settling.role(b, At(t)) for t in (1, 2, 3)] == [Role.SHARED] * 3
    with pytest.raises(ValueError, match="settled_after must be >= 0, got -1"):
        method.SettlingLoRA(settled_after=-1)
    summary = run(*fields)
    assert summary["refused"] == {}
    first, second = summary["interference"]
    assert second < 1e-5 < first


def test_the_method_s_yaml_is_like_the_others() -> None:
    text = code("yaml")[0]
    keys = re.findall(r"^ *([\w]+):", text, re.MULTILINE)
    assert keys == ["lr", "method", "_target_", "rank", "alpha", "settled_after"]
    lora = (CONF / "method/lora.yaml").read_text()
    assert set(keys[:-1]) <= set(re.findall(r"^ *([\w]+):", lora, re.MULTILINE))
    assert f"_target_: {METHOD}.SettlingLoRA\n" in text


@pytest.mark.parametrize(
    ("number", "power", "expected"), [(1, 0.5, 3.0), (4, 0.5, 2.0), (4, 0, 3.0)]
)
def test_the_strategy_steps_less_in_later_rounds(
    strategy: ModuleType, number: int, power: float, expected: float
) -> None:
    before, mean = {"x": torch.ones(2)}, {"x": torch.full((2,), 3.0)}
    round = Round(number, [At(number, 0)], [mean], [1.0], before)
    assert strategy.Slowing(power=power).server(mean, round, {})["x"].tolist() == [expected] * 2


def test_a_run_with_the_strategy(strategy: ModuleType, run: Any) -> None:
    assert run(f"strategy._target_={STRATEGY}.Slowing", "num_rounds=1")["refused"] == {}
    with pytest.raises(ValueError, match="power must be >= 0, got -1"):
        run(f"strategy._target_={STRATEGY}.Slowing", "+strategy.power=-1")


def test_the_strategy_s_yaml_sets_its_fields(strategy: ModuleType) -> None:
    values = yaml.safe_load(code("yaml")[2])
    assert values.pop("_target_") == f"{STRATEGY}.Slowing"
    assert strategy.Slowing(**values) == strategy.Slowing()


def test_the_data_set_s_yaml_makes_a_task() -> None:
    values = yaml.safe_load(code("yaml")[1])
    fields = [f"data.{key}={'null' if value is None else value}" for key, value in values.items()]
    task = load_config(["data=table", *(field.replace("'", "") for field in fields)]).data
    assert (task.columns(), task.label_names) == (
        ["subject", "body"],
        ["billing", "delivery", "returns"],
    )
    assert (task.headline, task.max_length, task.validation_split) == ("f1_macro", 64, None)


def test_the_kinds_of_tasks_exist() -> None:
    sentence = page(EXTENDING).partition("is a kind of task: ")[2].partition(".\n")[0]
    named = set(re.findall(r"`(\w+)`", sentence))
    targets = {yaml.safe_load(p.read_text())["_target_"] for p in (CONF / "data").glob("*.yaml")}
    used = {t.rpartition(".")[2] for t in targets if "Docstrings" not in t}
    assert used < named and len(named) == 7


def test_the_code_of_the_page_on_python(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (block,) = [b for b in blocks("docs/python.md") if b.language == "python"]
    small = [*base, *TINY["fedtt"], f"run_dir={tmp_path / 'run'}"]
    whole = fedpeft.run
    monkeypatch.setattr(fedpeft, "run", lambda overrides: whole([*small, *overrides]))
    exec(compile(block.text, "docs/python.md", "exec"), {})
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    accuracy, sent = capsys.readouterr().out.splitlines()[-1].split()
    assert float(accuracy) == summary["final"]["test_accuracy"]
    assert int(sent) == summary["bytes"]["uplink_bytes"] > 0


# --- the README ----------------------------------------------------------------------------------


def test_the_quickstart_s_table_is_the_saved_one() -> None:
    saved = table(page("results/quickstart/comparison.md"), "| method | quality")
    shown = table(page("docs/results.md"), "| method | quality")
    assert list(shown) == list(saved)
    for name, (quality, test, start, _, _, trained, up, down, total, _) in saved.items():
        assert shown[name] == [quality, test, start, trained, up, down, total]


def test_the_readme_is_short_and_counts_the_methods() -> None:
    text = page("README.md")
    assert len(text.splitlines()) <= 150
    assert f"the mathematics of all {len(list((CONF / 'method').glob('*.yaml')))}," in text


# --- roles ---------------------------------------------------------------------------------------

PARTS = {  # words of the table of roles: patterns of BERT's parameters, in round 1
    "A": r"lora_A",
    "B": r"lora_B",
    "C": r"\.compress$",
    "W2'": r"\.project$",
    "head": r"^classifier\.",
    "all TT factors and biases": r"factor_|(adapter\.(down|up)|pooler\.dense)\.bias$",
    "first, last and one middle factor of each TT": r"factor_[13]_of_|factor_(\d)_of_\1$",
    "the other factors": r"factor_([24]_of_5|[245]_of_6)$",
    "TT biases": r"(adapter\.(down|up)|pooler\.dense)\.bias$",
}
ROLES = table(page("docs/sent.md"), "| method | shared |")
COLUMNS = (Role.SHARED, Role.PERSONAL, Role.FROZEN)


@pytest.mark.parametrize("name", ROLES)
def test_the_roles_are_the_method_s(name: str) -> None:
    config = load_config(["model=bert_base", "data=sst2", f"method={name}"])
    task = config.data
    model = config.method.inject(config.model.build_meta(task.auto_class, task.num_labels))
    roles = Roles(config, model).by_name(1)
    role = {name: roles.get(name, Role.FROZEN) for name, _ in model.named_parameters()}
    covered: set[str] = set()
    for cell, expected in zip(ROLES[name], COLUMNS, strict=True):
        for word in re.split(r", (?!last)", cell) if cell else ():
            names = {name for name in role if re.search(PARTS[word], name)}
            assert {role[name] for name in names} == {expected}, word
            covered |= names
    assert {name for name in role if role[name] in TRAINS} <= covered


# --- methods -------------------------------------------------------------------------------------

METHODS = page("docs/methods.md")
NAMES = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
COUNTS = {
    name: cells[0].strip("`")
    for names, cells in table(METHODS, "| methods | numbers").items()
    for name in re.findall(r"\w+", names)
}
ROBERTA = {"L": 12, "d": 768, "f": 3072, "g": 2, "n": 24, "head": 768 * 769 + 2 * 769}
LLAMA = {"L": 32, "d": 4096, "f": 11008, "g": 3, "n": 64, "head": 0}
LAYERNORMS = {"norms": 25 * 2 * 768, "biases": 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 768}
RMSNORMS = {"norms": 65 * 4096}
# Methods of the table of sizes in docs/sent.md: the spans of what trains on both models.
TRAINED = {
    name: (cells[0], cells[3])
    for names, cells in table(page("docs/sent.md"), "| method | RoBERTa-base: trained").items()
    for name in re.findall(r"\w+", re.sub(r" (r=|rank ).*", "", names))
}


def test_every_method_has_a_section_and_a_place_in_both_tables() -> None:
    sections = re.findall(r"^`method=(\w+)`|\. `method=(\w+)`", METHODS, re.MULTILINE)
    assert sorted(a or b for a, b in sections) == NAMES
    exact = METHODS.partition("| the mean is |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`([a-z0-9_]+)`", exact)) == NAMES
    assert sorted([*COUNTS, "fedtt", "fedtt_plus", "full"]) == NAMES


@pytest.mark.parametrize("name", COUNTS)
def test_the_formulas_count_what_trains(name: str) -> None:
    values = yaml.safe_load((CONF / f"method/{name}.yaml").read_text())["method"]
    own = {"r": values.get("rank"), "k": values.get("heads"), "b": values.get("bottleneck")}
    own |= {"m": values.get("num_tokens"), "H": values.get("hidden")}
    both = ((ROBERTA | LAYERNORMS, 0), (LLAMA | RMSNORMS, 1))
    for model, at in both:
        counted = TRAINED[name][at].split("-")[-1].replace(",", "")
        if counted.startswith("refused"):
            continue
        sizes = model | {"i": model["d"], "o": model["d"]} | own
        assert eval(COUNTS[name], {}, sizes) + model["head"] == int(counted)


# --- diagnostics ---------------------------------------------------------------------------------

MEASURED = table(page("docs/diagnostics.md"), "| method | interference |")


@pytest.mark.parametrize("name", MEASURED)
def test_the_diagnostics_are_the_quickstart_s(name: str) -> None:
    folder = f"results/quickstart/{name}"
    summary = json.loads(page(f"{folder}/summary.json"))
    last = json.loads(page(f"{folder}/metrics.jsonl").splitlines()[-1])
    gap = summary["interference"][-1]
    assert MEASURED[name] == [
        "-" if gap is None else f"{gap:.3f}",
        f"{last['update_norm_mean']:.2f}",
        f"{last['update_norm_std']:.2f}",
        f"{last['update_cosine']:.2f}",
        f"{max(summary['initial_error'].values(), default=0):.3f}",
    ]


def test_the_diagnostics_have_the_quickstart_s_methods() -> None:
    assert sorted(MEASURED) == sorted(table(page("docs/results.md"), "| method | quality"))


def test_every_benchmark_s_file_is_on_the_page() -> None:
    text = page("docs/performance.md")
    linked = re.findall(r"\[(\w+)\.json\]\(\.\./results/benchmarks/\1\.json\) \|", text)
    assert sorted(linked) == sorted(p.stem for p in (ROOT / "results/benchmarks").glob("*.json"))
    programs = re.findall(r"^\| `(\w+)[^`]*` \| \[", text, re.MULTILINE)
    assert all((ROOT / f"benchmarks/{program}.py").is_file() for program in programs)
