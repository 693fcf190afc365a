"""The experiments of papers' tables: their methods, clients and settings, and that all compose.

Nothing is trained. The numbers are the papers', where the papers give them.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from fedpeft.commands.study import plan_of
from fedpeft.config.compose import CONF, composed
from fedpeft.config.load import load_config
from fedpeft.engine.parameters import check_on_meta, count_on_meta
from fedpeft.reporting.run_files import check_same
from fedpeft.reporting.study_plan import StudyPlan
from fedpeft.simulation.estimate import estimate
from tests.conftest import ROOT

TABLES = (
    "scl_table1",
    "scl_table2",
    "fedtt_table1",
    "fedtt_table2",
    "fedtt_table3",
    "fedtt_table9",
)
SCALES = ("paper", "small")
OPTIONS: dict[str, str] = dict.fromkeys(("--methods", "--lrs", "--seeds", "--extend", "--data"), "")
OF_SCL = {"scl", "fedsa_lora", "ffa_lora", "lora"}
OF_FEDTT = {
    *("fedtt", "fedtt_plus", "lora", "rolora", "ffa_lora"),
    *("bitfit", "prompt", "p_tuning", "ia3", "adapter"),
}


@cache
def plan(table: str, scale: str) -> StudyPlan:
    """Return the plan of ``fedpeft study experiment=TABLE scale=SCALE``."""
    return plan_of(Path("x"), [f"experiment={table}", f"scale={scale}"], OPTIONS, "lora")


def first(table: str, scale: str, cell: int = 0, entry: int = 0) -> DictConfig:
    """Return the composed configuration of one run of a table.

    Args:
        table: name of the experiment.
        scale: ``paper`` or ``small``.
        cell: number of the cell.
        entry: number of the method.
    """
    study = plan(table, scale).studies()[cell]
    method, *extra = study.entries[entry].split("+")
    return composed([*study.base, f"method={method}", *extra])


def cells(table: str, scale: str) -> list[dict[str, str]]:
    """Return the overrides of each cell."""
    settings = plan(table, scale).settings
    return [dict(o.split("=", 1) for o in [*settings.common, *c.split()]) for c in settings.cells]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", TABLES)
def test_learning_rates_are_chosen_over_three_seeds_and_the_grid_may_grow(
    table: str, scale: str
) -> None:
    settings = plan(table, scale).settings
    assert settings.seeds == [0, 1, 2] and len(settings.lrs) == 3 and settings.extend >= 2
    assert settings.estimate == (scale == "paper")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("table", "alpha"), [("scl_table1", 32), ("scl_table2", 16)])
def test_methods_of_scl(table: str, alpha: int, scale: str) -> None:
    entries = plan(table, scale).settings.methods
    assert {entry.split("+")[0] for entry in entries} == OF_SCL
    starts = {f"scl+method.init={init}" for init in ("random_pinv", "svd", "residual")}
    assert starts <= set(entries)
    bounds = [e.split("+")[1] for e in entries if "strategy=" in e]
    assert bounds == ["strategy=local_only", "strategy=centralized"]
    assert first(table, scale).method.init == "random_pinv"
    for number, entry in enumerate(entries):
        if not entry.startswith("scl"):
            method = first(table, scale, entry=number).method
            where = [*method.targets]
            ours = table == "scl_table2" and where == ["down_proj"]  # as large as SCL of rank 10
            assert (method.rank, method.alpha) == ((10, 10) if ours else (8, alpha))
            assert ours or where == ["q", "k", "v"]


@pytest.mark.parametrize("scale", SCALES)
def test_table_2_of_scl_has_a_floor_that_is_not_searched(scale: str) -> None:
    of_plan = plan("scl_table2", scale)
    floor = of_plan.settings.methods[-1]
    assert first("scl_table2", scale, entry=-1).num_rounds == 0
    assert [study.count(floor) for study in of_plan.studies()] == [3] * len(
        cells("scl_table2", scale)
    )


@pytest.mark.parametrize("scale", SCALES)
def test_clients_of_scl(scale: str) -> None:
    assert [c["num_clients"] for c in cells("scl_table1", scale)] == ["3", "4", "5"]
    texts = [(c["data"], c["num_clients"]) for c in cells("scl_table2", scale)]
    pairs = [(data, n) for data in ("medquad", "dolly") for n in "34"]
    assert texts == (pairs[::3] if scale == "small" else pairs * 2)
    for table in ("scl_table1", "scl_table2"):
        tree = first(table, scale)
        assert tree.partition._target_.endswith("Dirichlet") and tree.partition.alpha == 0.1
        assert (tree.early_stopping.patience is None) is (scale == "small")  # equal steps for all


def test_epochs_of_scl_s_papers_and_equal_steps_of_the_small_ones() -> None:
    for table in ("scl_table1", "scl_table2"):
        tree = first(table, "paper")
        assert (tree.num_rounds, tree.local_epochs, tree.local_steps) == (10, 1, None)
        assert first(table, "small").local_steps is not None
    assert {c["model"] for c in cells("scl_table2", "paper")} == {"tinyllama", "gemma_2b"}
    assert {c["model"] for c in cells("scl_table1", "paper")} == {"siglip"}
    assert {c["model"] for c in cells("scl_table1", "small")} == {"dinov2_small"}
    assert {c["model"] for c in cells("scl_table2", "small")} == {"smollm2"}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", ["fedtt_table1", "fedtt_table2", "fedtt_table3"])
def test_methods_of_fedtt(table: str, scale: str) -> None:
    entries = plan(table, scale).settings.methods
    assert {entry.split("+")[0] for entry in entries} == OF_FEDTT
    assert {"fedtt_plus", "fedtt_plus+method.active=one"} <= set(entries)
    ranks = [
        first(table, scale, entry=i).method.rank for i, e in enumerate(entries) if e[:4] == "lora"
    ]
    assert ranks == [8, 2]
    assert first(table, scale).method.tt_rank == 5


@pytest.mark.parametrize(
    ("table", "scale", "expected"),
    [
        ("fedtt_table1", "paper", {"local_steps": 1, "optimizer.keep_state": True}),
        (
            "fedtt_table1",
            "small",
            {"local_steps": 1, "optimizer.keep_state": True, "num_clients": 3},
        ),
        ("fedtt_table2", "paper", {"num_rounds": 100, "data.max_length": 128}),
        ("fedtt_table3", "paper", {"local_steps": 20, "num_rounds": 500, "batch_size": 64}),
        ("fedtt_table3", "small", {"local_steps": 20, "num_clients": 3}),
        ("fedtt_table9", "paper", {"model.load_in": "4bit", "data.scoring": "likelihood"}),
    ],
)
def test_numbers_of_fedtt(table: str, scale: str, expected: dict[str, Any]) -> None:
    tree: Any = first(table, scale)
    for key, value in expected.items():
        node = tree
        for part in key.split("."):
            node = node[part]
        assert node == value, key
    assert tree.optimizer.name == "adamw"
    kind = "EqualSize" if table == "fedtt_table2" else "IID"
    assert tree.partition._target_.endswith(f".{kind}")


@pytest.mark.parametrize(("scale", "cell"), [("paper", 2), ("small", 0)])
def test_the_cross_device_half_is_fedpetuning_s(scale: str, cell: int) -> None:
    tree = first("fedtt_table2", scale, cell)
    assert (tree.num_clients, tree.clients_per_round) == (100, 10)
    assert (tree.local_epochs, tree.local_steps, tree.batch_size) == (1, None, 32)
    assert (tree.optimizer.schedule, tree.partition.alpha) == ("linear", 1.0)


def test_data_and_clients_of_fedtt() -> None:
    glue = ["mrpc", "sst2", "qnli", "qqp", "mnli"]
    assert [c["data"] for c in cells("fedtt_table1", "paper")] == glue
    assert [c["data"] for c in cells("fedtt_table2", "paper")] == glue
    third = cells("fedtt_table3", "paper")
    assert [c["num_clients"] for c in third] == ["3", "20", "50"] * 4
    assert all(c["batch_size"] == ("64" if c["data"] == "sst2" else "32") for c in third)
    assert [c["num_clients"] for c in cells("fedtt_table3", "small")] == ["3", "3", "20", "50"]
    skewed = first("fedtt_table3", "small", cell=1).partition
    assert skewed._target_.endswith(".Dirichlet") and skewed.alpha == 0.1
    ninth = {(c["model"], c["data"]) for c in cells("fedtt_table9", "paper")}
    models, sets = ("llama2_7b", "llama2_13b"), ("copa", "record", "squad")
    assert ninth == {(model, data) for model in models for data in sets}


def test_no_file_names_a_folder_of_data() -> None:
    for table in TABLES:
        for file in (CONF / "experiment").glob(f"{table}*/*.yaml"):
            assert "path" not in file.read_text()


OF_MODELS = {  # one cell of each model of a table
    (table, scale, cell["model"]): number
    for table in TABLES
    for scale in SCALES
    for number, cell in reversed(list(enumerate(cells(table, scale))))
}
CLASSES = "data.labels=[glioma,meningioma,no_tumor,pituitary]"  # which else stand in the data


@pytest.mark.matrix
@pytest.mark.parametrize(("chosen", "cell"), OF_MODELS.items())
def test_every_method_fits_its_model(chosen: tuple[str, str, str], cell: int) -> None:
    table, scale, _ = chosen
    study = plan(table, scale).studies()[cell]
    base = [*study.base, CLASSES] if table == "scl_table1" else study.base
    refused = {entry: text for entry in study.entries if (text := refusal(base, entry))}
    assert study.entries and refused == {}


def refusal(base: Sequence[str], entry: str) -> str | None:
    """Return the sentence by which an entry of a table is refused; null if it fits."""
    method, *extra = entry.split("+")
    try:
        check_on_meta(load_config([*base, f"method={method}", *extra]))
    except ValueError as error:
        return str(error)
    return None


def test_an_estimate_by_hand(base: list[str]) -> None:
    """Three clients, two rounds of two steps with 8 rows of at most 128 tokens."""
    config = load_config([*base, "method.rank=4", "optimizer.name=sgd"])
    counts = count_on_meta(config)
    cost = estimate(config)
    assert cost.operations == 4 * counts["total"] * (8 * 128) * 2 * (3 * 2)
    assert cost.sent == 6 * (counts["bytes_up"][1] + counts["bytes_down"][1])
    held = 2 * 34 * (8 * 128) * 32 * 2  # 32 bits, hidden size 32, 2 layers
    assert cost.memory == 4 * counts["total"] + 16 * counts["trained"][1] + held


def test_an_estimate_counts_the_patches_that_a_model_reads() -> None:
    """DINOv2's positions are of 37 x 37 patches, its images have 16 x 16."""
    chosen = ["model=dinov2_small", "data=brain_tumor", "data.labels=[a,b]", "local_steps=1"]
    config = load_config([*chosen, "num_clients=3", "num_rounds=1", "batch_size=2"])
    total = count_on_meta(config)["total"]
    assert estimate(config).operations == 4 * total * 2 * (16 * 16 + 1) * 3


def test_the_estimate_of_a_study_counts_its_runs(
    fedpeft: Callable[..., str], base: list[str]
) -> None:
    rest = [o for o in base if not o.startswith("method=")]
    methods = "lora+method.targets=[q,k],bitfit,bitfit+lr=0.1"
    options = ["--estimate", "--methods", methods, "--lrs", "1e-3,1e-2", "--seeds", "0,1,2"]
    text = fedpeft("study", *options, "study.finalists=1", *rest)
    # Both rates with the first seed, one with the others; and the rate of an entry's own.
    assert "In all 11 runs: about 0.00 hours at 1e+14 operations a second" in text
    assert "lora+method.targets=[q,k]" in text
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("experiment", "data", "run"),
    [
        (
            "best_scl",
            "data/medquad",
            "scl_table2/data=medquad_num_clients=3/scl+method.init=residual+method.rank=10/lr=0.009",
        ),
        (
            "best_fedtt",
            "data/sst2",
            "fedtt_variants/data=sst2/fedtt_plus+method.active=one+method.init=zero_last/lr=0.033",
        ),
    ],
)
def test_the_best_of_the_studies_are_their_runs(experiment: str, data: str, run: str) -> None:
    there = ("runtime=inprocess", "runtime.threads=1", "evaluation.clients=always", "seed=1")
    path = ROOT / "results" / run / "seed=1"
    now = composed([f"experiment={experiment}", f"data.path={data}", *there])
    check_same(OmegaConf.load(path / "config.yaml"), now, path)
