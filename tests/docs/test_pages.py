"""The pages' code runs as printed, and their tables hold what the code does."""

import csv
import json
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from scipy import stats

import fedpeft
from fedpeft.config.load import CONF, composed, load_config
from fedpeft.engine.roles import Roles
from fedpeft.methods.base import At, Round
from fedpeft.reporting.run_directory import check_same
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


ENTRIES = {  # of the study, by the names in the tables
    "LoRA, rank 2": "lora+method.rank=2+method.alpha=4",
    "LoRA, rank 8": "lora",
    "FFA-LoRA, rank 8": "ffa_lora",
    "RoLoRA, rank 8": "rolora",
    "FedTT": "fedtt",
    "FedTT, rank 2": "fedtt+method.tt_rank=2",
    "FedTT, rank 5": "fedtt",
    "FedTT, rank 10": "fedtt+method.tt_rank=10",
    "FedTT, rank 20": "fedtt+method.tt_rank=20",
    "FedTT, rank 5, 120 rounds": "fedtt+num_rounds=120+evaluation.every=40",
    "FedTT, rank 5, zero_last": "fedtt+method.init=zero_last",
    "FedTT+": "fedtt_plus",
    "FedTT+, three factors": "fedtt_plus",
    "FedTT+, active=one": "fedtt_plus+method.active=one",
    "FedTT+, active=one, zero_last": "fedtt_plus+method.active=one+method.init=zero_last",
    "IA3": "ia3",
    "adapter": "adapter",
    "BitFit": "bitfit",
    "prompt": "prompt",
    "P-tuning": "p_tuning",
}


def chosen_rows(*studies: str) -> dict[str, list[dict[str, str]]]:
    """Return the rows of runs.csv with the chosen rates, by entry and in the order of seeds."""
    rows: dict[str, list[dict[str, str]]] = {}
    for study in studies:
        with (ROOT / "results" / study / "runs.csv").open() as file:
            for row in csv.DictReader(file):
                if row["chosen"] == "True":
                    rows.setdefault(row["method"], []).append(row)
    assert all([row["seed"] for row in of_entry] == ["0", "1", "2"] for of_entry in rows.values())
    return rows


def over_seeds(rows: list[dict[str, str]], key: str) -> str:
    """Return a cell: mean and sample standard deviation over the seeds."""
    values = [float(row[key]) for row in rows if row[key]]
    if not values:
        return "-"
    return f"{fmean(values):.3f} ± {stdev(values):.3f}".replace("0.", ".")


def megabytes(rows: list[dict[str, str]]) -> str:
    return f"{fmean(float(row['bytes']) for row in rows) / 1e6:.1f}"


def minus(rows: list[dict[str, str]], others: list[dict[str, str]], key: str) -> str:
    """Return a cell: mean difference with the 95 % interval of a paired t-test over three seeds."""
    lost = [float(a[key]) - float(b[key]) for a, b in zip(rows, others, strict=True)]
    half = stats.t.ppf(0.975, len(lost) - 1) * stdev(lost) / len(lost) ** 0.5
    low, high = fmean(lost) - half, fmean(lost) + half
    return f"{fmean(lost):+.3f} ({low:+.3f} to {high:+.3f})".replace("0.", ".")


def test_the_tables_of_fedtt_are_the_study_s() -> None:
    saved = chosen_rows("fedtt_table1/data=sst2")
    whole = table(page("results/fedtt_table1/README.md"), "| method | rate | global test")
    first = table(page("README.md"), "| method | accuracy")
    assert {ENTRIES[name] for name in whole} == {ENTRIES[name] for name in first} == set(saved)
    for name, (rate, *shown) in whole.items():
        rows = saved[ENTRIES[name]]
        assert {float(row["lr"]) for row in rows} == {float(rate)}
        measured = [over_seeds(rows, key) for key in ("global_test", "quality")]
        assert shown == [*measured, megabytes(rows)]
    for name, shown in first.items():
        assert shown in [row[1:] for n, row in whole.items() if ENTRIES[n] == ENTRIES[name]]


def test_the_table_of_fedtt_s_variants_is_the_two_studies_own() -> None:
    saved = chosen_rows("fedtt_table1/data=sst2", "fedtt_variants/data=sst2")
    shown = table(page("results/fedtt_table1/README.md"), "| variant | rate")
    assert len(shown) == 8
    original: list[dict[str, str]] = []
    for name, (rate, *cells, sent, difference) in shown.items():
        rows = saved[ENTRIES[name]]
        assert {float(row["lr"]) for row in rows} == {float(rate)}
        assert cells == [over_seeds(rows, k) for k in ("validation", "quality", "global_test")]
        assert sent == megabytes(rows)
        if difference:
            assert difference == minus(rows, original, "global_test")
        else:
            original = rows  # those below it are compared with it


OF_SCL = {
    "LoRA, all rows in one place": "lora+strategy=centralized+method.targets=[q,k,v]",
    "SCL, residual, rank 10": "scl+method.init=residual+method.rank=10",
    "LoRA on SCL's matrix, rank 10": (
        "lora+method.targets=[down_proj]+method.rank=10+method.alpha=10"
    ),
    "FedSA-LoRA": "fedsa_lora+method.targets=[q,k,v]",
    "LoRA, each client alone": "lora+strategy=local_only+method.targets=[q,k,v]",
    "SCL, residual, rank 64": "scl+method.init=residual",
    "LoRA": "lora+method.targets=[q,k,v]",
    "FFA-LoRA": "ffa_lora+method.targets=[q,k,v]",
    "untuned": "lora+lr=1e-3+num_rounds=0+method.targets=[q,k,v]",
    "SCL, svd, rank 64": "scl+method.init=svd",
    "SCL, random_pinv (the paper's), rank 64 (ours)": "scl+method.init=random_pinv",
}


def test_the_tables_of_scl_are_the_study_s() -> None:
    saved = chosen_rows("scl_table2/data=medquad_num_clients=3")
    shown = table(page("results/scl_table2/README.md"), "| method | rate | validation loss")
    assert shown.keys() == OF_SCL.keys() and saved.keys() == set(OF_SCL.values())
    for name, (rate, *cells, sent) in shown.items():
        rows = saved[OF_SCL[name]]
        assert name == "untuned" or {float(row["lr"]) for row in rows} == {float(rate)}
        keys = ("validation", "quality", "global_test", "test_loss")
        assert cells == [over_seeds(rows, key) for key in keys]
        assert sent == megabytes(rows)
    for name, of_readme in table(page("README.md"), "| method | loss, server's rows").items():
        _, _, quality, _, loss, sent = shown[name]
        assert of_readme == [loss, quality, sent]
    text = page("results/scl_table2/README.md")
    pairs = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)[1:]
    assert len(pairs) == 7
    for first, second, difference in pairs:
        one, other = saved[OF_SCL[first]], saved[OF_SCL[second]]
        both = all(row["test_loss"] for row in (*one, *other))
        assert difference == minus(one, other, "test_loss" if both else "client_test_loss")


def test_the_differences_that_the_pages_name_in_words_are_the_studies_own() -> None:
    with (ROOT / "results/scl_table2/data=medquad_num_clients=3/runs.csv").open() as file:
        rows = list(csv.DictReader(file))

    def of(name: str, lr: float) -> list[dict[str, str]]:
        return [r for r in rows if r["method"] == OF_SCL[name] and float(r["lr"]) == lr]

    text = page("results/scl_table2/README.md")
    small, lora = of("SCL, residual, rank 10", 9e-3), of("LoRA", 9e-3)
    large, shared = of("SCL, residual, rank 64", 3e-3), of("FedSA-LoRA", 3e-3)
    slow = minus(of("SCL, residual, rank 10", 3e-3), of("LoRA", 3e-3), "test_loss")
    ffa = minus(of("FFA-LoRA", 9e-3), lora, "test_loss")
    alone = minus(of("LoRA, each client alone", 3e-3), shared, "validation")
    personal = minus(shared, lora, "quality")
    rouge = [minus(a, lora, key) for a in (small, large) for key in ("quality", "global_test")]
    words = " ".join(text.split())
    for difference in (slow, ffa, personal, *rouge):
        assert difference in words
    assert alone.startswith("+.011 (+.001 to +.020)") and ".011 (.001 to .020) higher" in words


def test_the_run_to_make_again_is_the_committed_one() -> None:
    run = ROOT / "results/fedtt_table1/data=sst2/ia3/lr=0.11/seed=2"
    saved = json.loads((run / "summary.json").read_text())["shared_state_sha256"]
    text = page("docs/reproducible.md")
    assert f"`{saved}`" in text
    (given,) = re.findall(r"^fedpeft run (.*?[^\\])\n", text, re.MULTILINE | re.DOTALL)
    now, then = (
        composed(shlex.split(given.replace("\\\n", ""))),
        OmegaConf.load(run / "config.yaml"),
    )
    check_same(then, now, run)
    assert now.runtime.threads == then.runtime.threads == 1


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
