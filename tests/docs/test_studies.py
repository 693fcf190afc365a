"""The numbers on the studies' pages agree with the committed runs."""

import csv
import json
import re
import shlex
from statistics import fmean, stdev

import pytest
from omegaconf import OmegaConf
from scipy import stats

from fedpeft.config.compose import composed
from fedpeft.reporting.run_files import check_same
from tests.conftest import ROOT
from tests.docs.documents import page, table

Rows = list[dict[str, str]]  # rows of runs.csv, one a seed
FEDTT, SCL = "results/fedtt_table1/README.md", "results/scl_table2/README.md"
TABLE2 = "results/fedtt_table2/README.md"
TABLE3 = "results/fedtt_table3/README.md"
IMAGES = "results/scl_table1/README.md"
SST2, MEDQUAD = "fedtt_table1/data=sst2", "scl_table2/data=medquad_num_clients=3"
MRPC = "fedtt_table1/data=mrpc_num_rounds=150_evaluation.every=50"
DOLLY = "scl_table2/data=dolly_num_clients=4"
CROSS_DEVICE = "fedtt_table2/data=sst2"
VARIANTS = "fedtt_variants/data=sst2"
TUMOURS, TUMOURS_4, TUMOURS_5 = (f"scl_table1/num_clients={count}" for count in (3, 4, 5))
IID, SKEWED = (
    f"fedtt_table3/data=sst2_num_clients=3{skew}"
    for skew in ("", "_partition=dirichlet_partition.alpha=0.1")
)
TWENTY = "fedtt_table3/data=sst2_num_clients=20_evaluation.max_client_rows=20"
FIFTY = TWENTY.replace("=20_", "=50_")
TEN_SEEDS = SKEWED.replace("fedtt_table3", "fedtt_skew")
ENTRIES = {  # the studies' entries, by the names on the pages
    "LoRA, rank 2": "lora+method.rank=2+method.alpha=4",
    "LoRA, rank 8": "lora",
    "FFA-LoRA, rank 8": "ffa_lora",
    "RoLoRA, rank 8": "rolora",
    "RoLoRA, rank 2": "rolora+method.rank=2+method.alpha=4",
    "FFA-LoRA, rank 2": "ffa_lora+method.rank=2+method.alpha=4",
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
    "LoRA, all rows in one place": "lora+strategy=centralized+method.targets=[q,k,v]",
    "SCL, residual, rank 10": "scl+method.init=residual+method.rank=10",
    "LoRA on SCL's matrix, rank 10": (
        "lora+method.targets=[down_proj]+method.rank=10+method.alpha=10"
    ),
    "FedSA-LoRA": "fedsa_lora+method.targets=[q,k,v]",
    "FedSA-LoRA on SCL's matrix, rank 10": (
        "fedsa_lora+method.targets=[down_proj]+method.rank=10+method.alpha=10"
    ),
    "LoRA, each client alone": "lora+strategy=local_only+method.targets=[q,k,v]",
    "SCL, residual, rank 64": "scl+method.init=residual",
    "LoRA": "lora+method.targets=[q,k,v]",
    "FFA-LoRA": "ffa_lora+method.targets=[q,k,v]",
    "untuned": "lora+lr=1e-3+num_rounds=0+method.targets=[q,k,v]",
    "SCL, residual, rank 9": "scl+method.init=residual+method.rank=9",
    "LoRA, alpha 32": "lora+method.alpha=32+method.targets=[q,k,v]",
    "LoRA, alpha 32, all rows in one place": (
        "lora+strategy=centralized+method.alpha=32+method.targets=[q,k,v]"
    ),
    "LoRA, alpha 32, each client alone": (
        "lora+strategy=local_only+method.alpha=32+method.targets=[q,k,v]"
    ),
    "FedSA-LoRA, alpha 32": "fedsa_lora+method.alpha=32+method.targets=[q,k,v]",
    "FFA-LoRA, alpha 32": "ffa_lora+method.alpha=32+method.targets=[q,k,v]",
    "SCL, svd, rank 64": "scl+method.init=svd",
    "SCL, random_pinv (the paper's), rank 64 (ours)": "scl+method.init=random_pinv",
}
TEN_SEEDS_ENTRIES = {  # entries of the label-skew study with ten seeds; each names its rate
    "FedTT, rank 5": "fedtt+lr=3e-3",
    "FedTT+, three factors": "fedtt_plus+lr=1e-2",
    "FedTT+, active=one": "fedtt_plus+lr=1e-2+method.active=one",
    "LoRA, rank 8": "lora+lr=3e-3",
    "LoRA, rank 2": "lora+lr=3e-3+method.rank=2+method.alpha=4",
    "RoLoRA, rank 2": "rolora+lr=1e-2+method.rank=2+method.alpha=4",
    "FFA-LoRA, rank 2": "ffa_lora+lr=1e-2+method.rank=2+method.alpha=4",
}
LEFT_OUT = (  # not among the methods that train and keep the model intact
    "untuned",
    "SCL, svd, rank 64",
    "SCL, random_pinv (the paper's), rank 64 (ours)",
)
OF_FEDTT = ("lr", "global_test", "quality", "bytes")
OF_MRPC = ("lr", "global_test", "test_accuracy", "quality", "bytes")
OF_README = ("test_loss", "quality", "bytes")
OF_SCL = ("lr", "validation", "quality", "global_test", "test_loss", "bytes")
OF_IMAGES = ("lr", "global_test", "client_test_accuracy", "quality", "bytes")
# Page, beginning of the table's heading, folder of the study, columns, and whether the table has
# all methods.
TABLES = [
    (FEDTT, "| method | rate | global test", SST2, OF_FEDTT, True),
    (FEDTT, "| on MRPC | rate", MRPC, OF_MRPC, True),
    ("README.md", "| method | accuracy", SST2, OF_FEDTT[1:], True),
    (TABLE2, "| cross-device | rate", CROSS_DEVICE, OF_FEDTT, True),
    (TABLE3, "| iid clients | rate", IID, OF_FEDTT, True),
    (TABLE3, "| 20 iid clients | global test", TWENTY, OF_FEDTT[1:], True),
    (TABLE3, "| 50 iid clients | global test", FIFTY, OF_FEDTT[1:], True),
    (TABLE3, "| clients with label skew | global test", SKEWED, OF_FEDTT[1:], True),
    (TABLE3, "| label skew, ten seeds | rate", TEN_SEEDS, OF_FEDTT, True),
    (SCL, "| on MedQuAD | rate", MEDQUAD, OF_SCL, True),
    (SCL, "| on Dolly | validation", DOLLY, OF_SCL[1:], True),
    (IMAGES, "| images, 3 clients | rate", TUMOURS, OF_IMAGES, True),
    (IMAGES, "| images, 4 clients | macro", TUMOURS_4, OF_IMAGES[1:], True),
    (IMAGES, "| images, 5 clients | macro", TUMOURS_5, OF_IMAGES[1:], True),
    ("README.md", "| method | loss, global test", MEDQUAD, OF_README, False),
]
# Page, beginning of the table's heading, folder of the study and number of pairs.
PAIRS = [
    (SCL, "| on MedQuAD, first |", MEDQUAD, 9),
    (SCL, "| on Dolly, first |", DOLLY, 9),
]

PAIRS_BY_TWO = [  # the same with two measures, and the measures' keys
    (IMAGES, "| images, first |", TUMOURS, 9, ("global_test", "client_test_accuracy")),
    (TABLE3, "| label skew, first |", TEN_SEEDS, 11, ("global_test", "quality")),
]


# --- cells ---------------------------------------------------------------------------------------


def all_rows(study: str) -> Rows:
    """Return a study's rows at all rates."""
    with (ROOT / "results" / study / "runs.csv").open() as file:
        return list(csv.DictReader(file))


def rows_of(study: str, rate: float | None = None) -> dict[str, Rows]:
    """Return a study's rows by entry, in the order of seeds.

    Args:
        study: the study's folder in ``results``.
        rate: the learning rate; null for the rate that the study chose.
    """
    found: dict[str, Rows] = {}
    for row in all_rows(study):
        if row["chosen"] == "True" if rate is None else float(row["lr"]) == rate:
            found.setdefault(row["method"], []).append(row)
    return found


def named(study: str, name: str, rate: float | None = None) -> Rows:
    """Return the rows of a method, all of the study's seeds, by its name on the pages."""
    rows = rows_of(study, rate)[entry_of(study, name)]
    seeds = 10 if study == TEN_SEEDS else 3
    assert [row["seed"] for row in rows] == [str(seed) for seed in range(seeds)]
    return rows


def entry_of(study: str, name: str) -> str:
    """Return the study's entry that has a name on the pages."""
    return (TEN_SEEDS_ENTRIES if study == TEN_SEEDS else ENTRIES)[name]


def cell(rows: Rows, key: str) -> str:
    """Return a cell: mean and sample standard deviation over the seeds."""
    values = [float(row[key]) for row in rows if row[key]]
    if key == "bytes":
        return f"{fmean(values) / 1e6:.1f}"
    return bare(f"{fmean(values):.3f} ± {stdev(values):.3f}") if values else "-"


def rounds_of(study: str, row: dict[str, str]) -> dict[int, dict[str, float]]:
    """Return the lines of a run's rounds, by round."""
    rate = f"lr={float(row['lr']):g}"
    file = ROOT / "results" / study / row["method"] / rate / f"seed={row['seed']}" / "metrics.jsonl"
    return {line["round"]: line for line in map(json.loads, file.read_text().splitlines())}


def minus(rows: Rows, others: Rows, key: str) -> str:
    """Return a cell: mean difference with the 95 % interval of a paired t-test over the seeds."""
    lost = [float(a[key]) - float(b[key]) for a, b in zip(rows, others, strict=True)]
    half = stats.t.ppf(0.975, len(lost) - 1) * stdev(lost) / len(lost) ** 0.5
    low, high = fmean(lost) - half, fmean(lost) + half
    return bare(f"{fmean(lost):+.3f} ({low:+.3f} to {high:+.3f})")


def below(study: str, name: str, other: str) -> list[float]:
    """Return by how much a method is below another on the global test, seed by seed."""
    pairs = zip(named(study, name), named(study, other), strict=True)
    return [float(b["global_test"]) - float(a["global_test"]) for a, b in pairs]


def pairs_of(document: str, heading: str, count: int) -> list[list[str]]:
    """Return the lines of a table of pairs: both names, then the differences."""
    lines = page(document).partition(heading)[2].partition("\n\n")[0].splitlines()[2:]
    assert len(lines) == count
    return [line.strip("| ").split(" | ") for line in lines]


def ranked_rates(name: str, name_with_20_steps: str) -> list[tuple[float, float]]:
    """Return the mean validation of both of SST-2's studies and the rate, the best first."""
    both: list[dict[float, float]] = []
    for study, entry in ((SST2, ENTRIES[name]), (IID, ENTRIES[name_with_20_steps])):
        by_rate: dict[float, list[float]] = {}
        for row in all_rows(study):
            if row["method"] == entry:
                by_rate.setdefault(float(row["lr"]), []).append(float(row["validation"]))
        both.append({rate: fmean(values) for rate, values in by_rate.items()})
    one, other = both
    return sorted((((one[r] + other[r]) / 2, r) for r in one.keys() & other.keys()), reverse=True)


def bare(numbers: str) -> str:
    """Return numbers without the zero before the point."""
    return re.sub(r"\b0\.", ".", numbers)


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("document", "heading", "study", "keys", "all_methods"), TABLES)
def test_a_table_is_the_study_s(
    document: str, heading: str, study: str, keys: tuple[str, ...], all_methods: bool
) -> None:
    shown = table(page(document), heading)
    assert not all_methods or {entry_of(study, name) for name in shown} == rows_of(study).keys()
    for name, cells in shown.items():
        rows = named(study, name)
        for key, shows in zip(keys, cells, strict=True):
            if key == "lr":
                assert name == "untuned" or {float(row["lr"]) for row in rows} == {float(shows)}
            else:
                assert shows == cell(rows, key), (name, key)


@pytest.mark.parametrize(("document", "heading", "study", "count"), PAIRS)
def test_a_table_of_pairs_is_the_study_s(
    document: str, heading: str, study: str, count: int
) -> None:
    for first, second, difference in pairs_of(document, heading, count):
        one, other = named(study, first), named(study, second)
        both = all(row["test_loss"] for row in (*one, *other))
        assert difference == minus(one, other, "test_loss" if both else "client_test_loss")


@pytest.mark.parametrize(("document", "heading", "study", "count", "keys"), PAIRS_BY_TWO)
def test_a_table_of_pairs_by_two_measures_is_the_study_s(
    document: str, heading: str, study: str, count: int, keys: tuple[str, str]
) -> None:
    for first, second, *differences in pairs_of(document, heading, count):
        one, other = named(study, first), named(study, second)
        assert differences == [minus(one, other, key) for key in keys], (first, second)


def test_the_table_of_pairs_with_four_and_five_clients_is_the_studies_own() -> None:
    heading = "| images, macro F1 on the global test, first |"
    for first, second, *differences in pairs_of(IMAGES, heading, 6):
        both = [(named(study, first), named(study, second)) for study in (TUMOURS_4, TUMOURS_5)]
        assert differences == [minus(one, other, "global_test") for one, other in both]


def test_the_table_of_fedtt_s_variants_is_the_two_studies_own() -> None:
    shown = table(page(FEDTT), "| variant | rate")
    assert len(shown) == 8
    original: Rows = []
    for name, (rate, *cells, sent, difference) in shown.items():
        study = VARIANTS if ENTRIES[name] in rows_of(VARIANTS) else SST2
        rows = named(study, name)
        assert {float(row["lr"]) for row in rows} == {float(rate)}
        assert cells == [cell(rows, key) for key in ("validation", "quality", "global_test")]
        assert sent == cell(rows, "bytes")
        if difference:
            assert difference == minus(rows, original, "global_test")
        else:
            original = rows  # the rows below it are compared with it


# --- words ---------------------------------------------------------------------------------------


def test_the_differences_that_the_page_on_scl_names_in_words_are_the_study_s() -> None:
    words = " ".join(page(SCL).split())
    small, lora = named(MEDQUAD, "SCL, residual, rank 10"), named(MEDQUAD, "LoRA")
    large, shared = named(MEDQUAD, "SCL, residual, rank 64"), named(MEDQUAD, "FedSA-LoRA")
    at_3e3 = [named(MEDQUAD, name, 3e-3) for name in ("SCL, residual, rank 10", "LoRA")]
    alone = minus(named(MEDQUAD, "LoRA, each client alone"), shared, "validation")
    assert minus(at_3e3[0], at_3e3[1], "test_loss") in words
    assert minus(named(MEDQUAD, "FFA-LoRA"), lora, "test_loss") in words
    assert minus(shared, lora, "quality") in words
    for scl in (small, large):
        assert minus(scl, lora, "quality") in words
        assert minus(scl, lora, "global_test") in words
    assert alone.startswith("+.011 (+.001 to +.020)") and ".011 (.001 to .020) higher" in words


def test_the_differences_on_dolly_that_the_page_names_in_words_are_the_study_s() -> None:
    words = " ".join(page(SCL).partition("## Dolly")[2].split())
    large, small = (named(DOLLY, f"SCL, residual, rank {rank}") for rank in (64, 10))
    assert f"rank 64 has {minus(large, small, 'quality')}" in words
    lost = minus(named(DOLLY, "FFA-LoRA"), named(DOLLY, "LoRA"), "test_loss")
    assert f"Minus LoRA it is {lost} on the global test" in words
    trained = rows_of(DOLLY).keys() - {ENTRIES[name] for name in LEFT_OUT}
    losses = [[float(row["validation"]) for row in rows_of(DOLLY)[entry]] for entry in trained]
    means = [fmean(values) for values in losses]
    assert bare(f"differ by {max(means) - min(means):.3f}") in words
    assert bare(f"deviation of {min(map(stdev, losses)):.3f} or more") in words
    by_seed = [
        float(b["test_loss"]) - float(a["test_loss"])
        for study in (MEDQUAD, DOLLY)
        for a, b in zip(
            *(named(study, f"SCL, residual, rank {rank}") for rank in (64, 10)), strict=True
        )
    ]
    assert bare(f"by {min(by_seed):.3f} to {max(by_seed):.3f}") in words


def test_the_differences_that_the_page_on_table_3_names_in_words_are_the_study_s() -> None:
    iid, skewed = " ".join(page(TABLE3).split()).split("## Three clients with label skew")
    for words, study in ((iid, IID), (skewed, SKEWED)):
        for rank, key in ((2, "global_test"), (8, "global_test"), (8, "quality")):
            lora = named(study, f"LoRA, rank {rank}")
            lost, _, interval = minus(named(study, "FedTT"), lora, key).partition(" (")
            assert lost[1:] in words and interval.rstrip(")") in words
    for name in ("FedTT+", "FedTT+, active=one"):
        assert minus(named(SKEWED, name), named(SKEWED, "FedTT"), "global_test") in skewed


def test_the_differences_of_20_clients_that_the_page_names_in_words_are_the_study_s() -> None:
    words = " ".join(page(TABLE3).partition("## Twenty iid clients")[2].split())
    words = words.partition("## Three clients with label skew")[0]
    fedtt, large, small = (
        named(TWENTY, name) for name in ("FedTT", "LoRA, rank 8", "LoRA, rank 2")
    )
    for rank in (2, 8):
        behind = below(TWENTY, "FedTT", f"LoRA, rank {rank}")
        assert min(behind) > 0
        assert bare(f"{min(behind):.3f} to {max(behind):.3f} (rank {rank})") in words
    for rows, others in (
        *((fedtt, lora) for lora in (large, small)),
        (named(TWENTY, "FedTT+"), fedtt),
        (named(TWENTY, "FedTT+, active=one"), fedtt),
        (named(TWENTY, "FedTT+, active=one"), named(TWENTY, "FedTT+")),
        (named(TWENTY, "FedTT+, active=one"), small),
        *((named(TWENTY, name), small) for name in ("RoLoRA, rank 2", "FFA-LoRA, rank 2", "IA3")),
    ):
        assert minus(rows, others, "global_test").rstrip(")") in words
    for lora in (large, small):
        assert minus(fedtt, lora, "quality") in words


def test_what_50_clients_give_is_as_the_page_says() -> None:
    words = " ".join(page(TABLE3).partition("## Fifty iid clients")[2].split())
    words = words.partition("## Three clients with label skew")[0]
    said: dict[str, list[str]] = {"loss": [], "accuracy": []}
    for rank in (2, 8):
        behind = below(FIFTY, "FedTT", f"LoRA, rank {rank}")
        assert min(behind) > 0
        assert bare(f"{min(behind):.3f} to {max(behind):.3f} (rank {rank})") in words
        for key in ("global_test", "quality"):
            rows, others = named(FIFTY, "FedTT"), named(FIFTY, f"LoRA, rank {rank}")
            assert minus(rows, others, key) in words
    for name in ("FedTT", "LoRA, rank 2", "LoRA, rank 8"):
        runs = [rounds_of(FIFTY, row) for row in named(FIFTY, name)]
        for key, texts in said.items():
            ends = [fmean(run[at][f"client_test_{key}"] for run in runs) for at in (5, 8)]
            texts.append(bare("{:.3f} to {:.3f}".format(*ends)))
    fedtt, small, large = said["accuracy"]
    assert fedtt == ".824 to .824" and "stays at .824" in words
    assert f"from {small} (LoRA of rank 2) and from {large} (rank 8)" in words
    assert "from {} (FedTT), {} and {}".format(*said["loss"]) in words


def test_what_20_clients_learn_and_gain_is_as_the_page_says() -> None:
    words = " ".join(page(TABLE3).partition("## Twenty iid clients")[2].split())
    said = []
    rises = []
    for name in ("FedTT", "LoRA, rank 2", "LoRA, rank 8"):
        runs = [rounds_of(TWENTY, row) for row in named(TWENTY, name)]
        losses, accuracies = (
            [fmean(run[at][f"client_test_{key}"] for run in runs) for at in (5, 8)]
            for key in ("loss", "accuracy")
        )
        said.append(bare("{:.3f} to {:.3f}".format(*losses)))
        rises.append(bare(f"{accuracies[1] - accuracies[0]:.3f}"))
    assert "by {}, {} and {}".format(*rises) in words
    assert "from {} (FedTT), {} (LoRA of rank 2) and {} (rank 8)".format(*said) in words
    gains = {
        entry: fmean(float(row["global_test"]) for row in rows)
        - fmean(float(row["global_test"]) for row in rows_of(IID)[entry])
        for entry, rows in rows_of(TWENTY).items()
    }
    lost = gains.pop("bitfit")
    least, most = (pick(gains, key=gains.__getitem__) for pick in (min, max))
    assert (least, most) == (ENTRIES["LoRA, rank 2"], "p_tuning")
    gained = bare(f"by {gains[least]:.3f} (LoRA of rank 2) to {gains[most]:.3f} (P-tuning)")
    assert f"{gained}, and BitFit's is {bare(f'{-lost:.3f}')} lower" in words
    sent = {e: fmean(float(row["bytes"]) for row in rows) for e, rows in rows_of(TWENTY).items()}
    for name, share in (("FFA-LoRA, rank 2", 53), ("IA3", 76), ("FedTT+, active=one", 50)):
        assert round(100 * sent[ENTRIES[name]] / sent[ENTRIES["LoRA, rank 2"]]) == share


def test_the_differences_that_the_page_on_table_2_names_in_words_are_the_study_s() -> None:
    words = " ".join(page(TABLE2).split())
    large, small = named(CROSS_DEVICE, "LoRA, rank 8"), named(CROSS_DEVICE, "LoRA, rank 2")
    fedtt, three, one = (
        named(CROSS_DEVICE, name) for name in ("FedTT", "FedTT+", "FedTT+, active=one")
    )
    for rows, others in ((fedtt, large), (fedtt, small), (three, fedtt), (one, fedtt)):
        for key in ("global_test", "quality"):
            assert minus(rows, others, key) in words
    for name in ("FFA-LoRA, rank 8", "RoLoRA, rank 8"):
        for lora in (large, small):
            assert minus(named(CROSS_DEVICE, name), lora, "global_test") in words
    for name in ("FedTT+", "FedTT+, active=one"):
        assert minus(named(CROSS_DEVICE, name, 1e-2), fedtt, "global_test") in words
    assert minus(named(CROSS_DEVICE, "IA3"), small, "global_test") in words
    for lora in (large, small):
        lost = [
            float(b["global_test"]) - float(a["global_test"])
            for a, b in zip(fedtt, lora, strict=True)
        ]
        assert min(lost) > 0 and bare(f"{min(lost):.3f} to {max(lost):.3f}") in words
    deceiving = rows_of(CROSS_DEVICE, 3.3e-2)[ENTRIES["LoRA, rank 2"]]
    first, *others = (bare(f"{float(row['validation']):.3f}") for row in deceiving)
    assert f"{first} with seed 0, {' and '.join(others)} with the others" in words


def test_methods_still_learn_at_the_end_of_table_2_as_the_page_says() -> None:
    words = " ".join(page(TABLE2).split())
    rises: dict[str, float] = {}
    means: dict[str, list[float]] = {}
    for entry, rows in rows_of(CROSS_DEVICE).items():
        runs = [rounds_of(CROSS_DEVICE, row) for row in rows]
        accuracies = [[run[at]["client_test_accuracy"] for at in (20, 30)] for run in runs]
        assert len(runs) == 3 and all(last > before for before, last in accuracies)
        means[entry] = [fmean(column) for column in zip(*accuracies, strict=True)]
        means[entry] += [fmean(run[at]["client_test_loss"] for run in runs) for at in (20, 30)]
        rises[entry] = means[entry][1] - means[entry][0]
    assert min(rises, key=rises.__getitem__) == ENTRIES["FedTT+, active=one"]
    assert max(rises, key=rises.__getitem__) == ENTRIES["BitFit"]
    low, high = min(rises.values()), max(rises.values())
    assert bare(f"by {low:.3f} (`active=one`) to {high:.3f} (BitFit)") in words
    behind = [abs(a - b) for a, b in zip(means["fedtt"], means["lora"], strict=True)]
    said = "narrows in accuracy ({:.3f} to {:.3f}) and widens in loss ({:.3f} to {:.3f})"
    assert bare(said.format(*behind)) in words


def test_the_signs_that_the_page_on_table_3_names_hold_with_ten_seeds() -> None:
    words = " ".join(page(TABLE3).partition("## Label skew with ten seeds")[2].split())
    fedtt, large, small, fixed, rotating = (
        [float(row["global_test"]) for row in named(TEN_SEEDS, name)]
        for name in (
            "FedTT, rank 5",
            "LoRA, rank 8",
            "LoRA, rank 2",
            "FFA-LoRA, rank 2",
            "RoLoRA, rank 2",
        )
    )
    for loras in (large, small):
        lost = [lora - own for lora, own in zip(loras, fedtt, strict=True)]
        assert min(lost) > 0 and bare(f"by {min(lost):.3f} to {max(lost):.3f}") in words
    lowest = [bare(f"{min(values):.3f}") for values in (fixed, rotating, small, large, fedtt)]
    said = "is {}**, RoLoRA's {}, LoRA's {} (rank 2) and {} (rank 8), FedTT's {}."
    assert said.format(*lowest) in words
    assert sum(own > lora for own, lora in zip(fixed, small, strict=True)) == 8
    assert "is above LoRA of rank 2 with eight seeds" in words
    high, low = sorted(fedtt)[5:], sorted(fedtt)[:5]
    assert [seed for seed, value in enumerate(fedtt) if value in low] == [2, 4, 5, 7, 9]
    assert "With seeds 2, 4, 5, 7 and 9 FedTT ends" in words
    assert bare(f"ends at {low[0]:.3f} to {low[-1]:.3f} on the global test") in words
    learnt = fmean(lora - own for lora, own in zip(large, fedtt, strict=True) if own in high)
    assert bare(f"at {high[0]:.3f} to {high[-1]:.3f}, {learnt:.3f} below LoRA") in words


def test_the_differences_on_mrpc_that_the_page_names_in_words_are_the_study_s() -> None:
    words = " ".join(page(FEDTT).partition("## MRPC")[2].split())
    fedtt, large = named(MRPC, "FedTT"), named(MRPC, "LoRA, rank 8")
    small, rotating = named(MRPC, "LoRA, rank 2"), named(MRPC, "FedTT+, active=one")
    for rows, others, keys in (
        (fedtt, large, ("global_test", "test_accuracy")),
        (fedtt, small, ("global_test", "test_accuracy")),
        (named(MRPC, "FedTT+"), fedtt, ("global_test",)),
        (rotating, fedtt, ("global_test",)),
        (rotating, small, ("global_test",)),
        (named(MRPC, "FFA-LoRA, rank 8"), large, ("global_test",)),
        (named(MRPC, "RoLoRA, rank 8"), large, ("global_test",)),
    ):
        for key in keys:
            lost, _, interval = minus(rows, others, key).partition(" (")
            assert lost in words and interval.rstrip(")") in words


def test_methods_beat_one_answer_on_mrpc_as_the_page_says() -> None:
    """One answer for all is "equivalent", which 279 of 408 rows have."""
    one_answer, share = 2 * 279 / (279 + 408), 279 / 408
    values = {
        entry: [(float(row["global_test"]), float(row["test_accuracy"])) for row in rows]
        for entry, rows in rows_of(MRPC).items()
    }
    above = {e for e, pairs in values.items() if min(f1 for f1, _ in pairs) > one_answer + 1e-9}
    assert above == {"fedtt", "lora", ENTRIES["LoRA, rank 2"]}
    below = {e for e, pairs in values.items() if fmean(f1 for f1, _ in pairs) < one_answer - 1e-9}
    names = ("FedTT+, active=one", "FFA-LoRA, rank 8", "RoLoRA, rank 8", "prompt", "IA3")
    assert below == {ENTRIES[name] for name in (*names, "P-tuning")}
    same = {e: sum(abs(f1 - one_answer) < 1e-9 for f1, _ in pairs) for e, pairs in values.items()}
    assert {entry: count for entry, count in same.items() if count} == {"adapter": 3, "bitfit": 1}
    lower = {e for e, pairs in values.items() if fmean(a for _, a in pairs) < share - 1e-9}
    assert lower == {"prompt", "p_tuning"}


def test_losses_on_mrpc_fall_and_rise_as_the_page_says() -> None:
    words = " ".join(page(FEDTT).partition("## MRPC")[2].split())
    curves: dict[str, list[float]] = {}
    for entry, rows in rows_of(MRPC).items():
        runs = [rounds_of(MRPC, row) for row in rows]
        assert len(runs) == 3
        curves[entry] = [
            fmean(run[at]["client_test_loss"] for run in runs) for at in (50, 100, 150)
        ]
    falling = {entry for entry, curve in curves.items() if min(curve) == curve[-1]}
    assert falling == {"ffa_lora", "lora", ENTRIES["FedTT+, active=one"]}
    said = "FedTT goes from {:.3f} to {:.3f} and back to {:.3f}".format(*curves["fedtt"])
    assert bare(said) in words
    rises = {entry: curve[-1] - curve[0] for entry, curve in curves.items()}
    highest = max(rises, key=lambda entry: rises[entry])
    assert highest == ENTRIES["LoRA, rank 2"]
    first, _, last = curves[highest]
    assert bare(f"largest rise in loss ({first:.3f} to {last:.3f})") in words


def test_the_differences_that_the_page_on_images_names_in_words_are_the_study_s() -> None:
    words = " ".join(page(IMAGES).split())
    lora, shared = named(TUMOURS, "LoRA, alpha 32"), named(TUMOURS, "FedSA-LoRA, alpha 32")
    alone = named(TUMOURS, "LoRA, alpha 32, each client alone")
    assert minus(shared, lora, "client_test_accuracy") in words
    assert minus(alone, shared, "client_test_accuracy") in words
    assert minus(shared, lora, "quality") in words
    other = cell(named(TUMOURS, "FFA-LoRA, alpha 32", 3.3e-3), "global_test")
    assert f"the other one, 3.3e-3, has {other}" in words
    for name in (
        "SCL, residual, rank 9",
        "LoRA, alpha 32",
        "LoRA, alpha 32, all rows in one place",
    ):
        assert cell(named(TUMOURS, name), "test_loss") in words


def test_signs_that_the_page_on_images_names_hold_in_all_nine_runs() -> None:
    words = " ".join(page(IMAGES).split())
    for above, below in (
        ("LoRA, alpha 32", "FFA-LoRA, alpha 32"),
        ("LoRA, alpha 32", "SCL, residual, rank 9"),
        ("SCL, residual, rank 64", "FFA-LoRA, alpha 32"),
        ("SCL, svd, rank 64", "SCL, random_pinv (the paper's), rank 64 (ours)"),
    ):
        gains = [
            float(one["global_test"]) - float(other["global_test"])
            for study in (TUMOURS, TUMOURS_4, TUMOURS_5)
            for one, other in zip(named(study, above), named(study, below), strict=True)
        ]
        assert len(gains) == 9 and min(gains) > 0
        assert bare(f"{min(gains):.3f} to {max(gains):.3f}") in words, (above, below)
    for study in (TUMOURS_4, TUMOURS_5):
        alone, shared = "LoRA, alpha 32, each client alone", "FedSA-LoRA, alpha 32"
        assert minus(named(study, alone), named(study, shared), "client_test_accuracy") in words
        for name in ("SCL, svd, rank 64", "SCL, random_pinv (the paper's), rank 64 (ours)"):
            assert cell(named(study, name), "test_accuracy") in words


@pytest.mark.parametrize(
    ("method", "name", "name_with_20_steps"),
    [
        ("adapter", "adapter", "adapter"),
        ("bitfit", "BitFit", "BitFit"),
        ("fedtt_plus", "FedTT+", "FedTT+"),
        ("ffa_lora", "FFA-LoRA, rank 8", "FFA-LoRA, rank 2"),
        ("ia3", "IA3", "IA3"),
        ("lora", "LoRA, rank 8", "LoRA, rank 8"),
        ("p_tuning", "P-tuning", "P-tuning"),
        ("prompt", "prompt", "prompt"),
        ("rolora", "RoLoRA, rank 8", "RoLoRA, rank 2"),
    ],
)
def test_a_default_rate_has_the_best_validation_of_both_studies_of_sst_2(
    method: str, name: str, name_with_20_steps: str
) -> None:
    ranked = ranked_rates(name, name_with_20_steps)
    assert composed([f"method={method}"]).lr == ranked[0][1]


def test_fedtt_keeps_a_rate_that_is_second_by_little() -> None:
    (best, other), (second, default), *_ = ranked_rates("FedTT", "FedTT")
    assert (other, default) == (3e-3, composed(["method=fedtt"]).lr)
    assert bare(f"by {best - second:.3f}") in page("docs/methods.md")


def test_rates_of_the_first_study_break_down_in_the_second_as_the_page_says() -> None:
    accuracies = [
        float(row["global_test"])
        for name, rate in (("adapter", 1e-2), ("BitFit", 1e-2), ("IA3", 1.1e-1))
        for row in rows_of(IID, rate)[ENTRIES[name]]
        if row["seed"] == "0"
    ]
    said = bare("{:.3f}, {:.3f} and {:.3f} on GLUE's dev set".format(*accuracies))
    assert said in " ".join(page("docs/methods.md").split())
    default = cell(named(SST2, "LoRA, rank 8", 3e-3), "global_test")
    assert f"3e-3, fedpeft's default, has {default}" in " ".join(page("README.md").split())


# --- answers -------------------------------------------------------------------------------------


def test_signs_that_the_answers_name_hold_in_each_run() -> None:
    """FedTT against LoRA in the six rows of SST-2; ``active=one`` against it with iid clients."""
    ten = (
        below(TEN_SEEDS, "FedTT, rank 5", "LoRA, rank 2"),
        below(TEN_SEEDS, "FedTT, rank 5", "LoRA, rank 8"),
    )
    assert min(map(min, ten)) > 0
    for study in (SST2, IID, TWENTY, FIFTY, CROSS_DEVICE):
        assert min(below(study, "FedTT", "LoRA, rank 2")) > 0
    for study in (IID, TWENTY, FIFTY, CROSS_DEVICE):
        assert min(below(study, "FedTT", "LoRA, rank 8")) > 0
    for study in (SST2, MRPC, IID, TWENTY):
        assert min(below(study, "FedTT+, active=one", "LoRA, rank 2")) > 0


def test_each_spread_in_the_answers_stands_on_a_study_s_page() -> None:
    studies = sorted((ROOT / "results").glob("*/README.md"))
    pages = " ".join(" ".join(file.read_text().replace("|", " ").split()) for file in studies)
    answers = " ".join(page("results/README.md").split())
    deviations = set(re.findall(r"\d*\.\d{3} ± \d*\.\d{3}", answers))
    intervals = set(re.findall(r"[+-]\d*\.\d{3} to [+-]\d*\.\d{3}", answers))
    assert len(deviations) > 15 and len(intervals) > 20
    assert {spread for spread in deviations | intervals if spread not in pages} == set()


# --- runs ----------------------------------------------------------------------------------------


def test_the_last_line_of_each_committed_run_is_its_summary_s() -> None:
    """Files of two runs must not mix when results are brought together."""
    summaries = sorted((ROOT / "results").glob("**/seed=*/summary.json"))
    assert len(summaries) > 400
    for file in summaries:
        final = json.loads(file.read_text())["final"]
        line = json.loads(file.with_name("metrics.jsonl").read_text().splitlines()[-1])
        measured = [key for key in line if key.startswith(("client_", "validation_"))]
        assert measured and {k: final[k] for k in measured} == {k: line[k] for k in measured}, file
        assert line["round"] == final["round"]


# --- runs to make again --------------------------------------------------------------------------


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
