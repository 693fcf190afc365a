"""``fedpeft partition``: its table, its picture, and a file that can be replayed."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedpeft.data.partitions.base import Dirichlet, Partition
from fedpeft.data.partitions.saved import Saved
from fedpeft.engine.engine import Engine
from fedpeft.reporting.figures import plot_partition
from fedpeft.reporting.partition import Holdings, holding_cells

Command = Callable[..., str]


@pytest.fixture
def partition(fedpeft: Command, base: list[str]) -> Command:
    """``partition("num_clients=4")`` gives what the command prints, run in an empty folder."""
    return lambda *arguments: fedpeft("partition", *base, *arguments)


def counts_of(text: str) -> list[list[int]]:
    return json.loads(text)["counts"]


def test_table_and_files(partition: Command, tmp_path: Path) -> None:
    text = partition("num_clients=4", "partition.alpha=0.3")
    counts = np.array(counts_of(partition("--json", "num_clients=4", "partition.alpha=0.3")))
    lines = [line.replace("│", " ").split() for line in text.splitlines() if "│" in line]
    for client, row in enumerate(counts):
        assert [str(client), str(row.sum()), *map(str, row)] in lines
    assert ["all", "240", "60", "60", "60", "60"] in lines
    assert "training rows by client and label" in text
    assert f"saved {tmp_path}/partition.png, partition.json" in text
    assert "no client's" not in text
    saved = json.loads((tmp_path / "partition.json").read_text())
    assert [len(rows) for rows in saved["clients"]] == counts.sum(1).tolist()
    assert sorted(sum(saved["clients"], [])) == list(range(240))
    assert (tmp_path / "partition.png").read_bytes().startswith(b"\x89PNG")


def test_notes_on_the_rows_are_shown(partition: Command, tmp_path: Path) -> None:
    texts = {
        "food": [*(f"bread {i}" for i in range(20)), ""],
        "Food": [f"a {i}" for i in range(20)],
    }
    rows = [{"text": text, "label": label} for label in texts for text in texts[label]]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = " ".join(partition("data.path=own.jsonl", "data.bad_rows=skip").split())
    assert "note: data set own.jsonl has no split validation and no split test" in text
    assert "differ by blanks or case only: 'Food' (20 rows), 'food' (20 rows)" in text
    assert "left out: 1 rows, each has an empty text" in text


def test_json_writes_nothing_unless_told_where(partition: Command, tmp_path: Path) -> None:
    counts = counts_of(partition("--json", "num_clients=4"))
    assert [sum(column) for column in zip(*counts, strict=True)] == [60] * 4
    assert list(tmp_path.iterdir()) == []
    again = counts_of(partition("--json", "num_clients=4", "--out", "a/b"))
    assert again == counts
    names = sorted(path.name for path in (tmp_path / "a/b").iterdir())
    assert names == ["partition.json", "partition.png"]


def test_a_saved_partition_replays_in_the_command_and_in_an_engine(
    partition: Command, tmp_path: Path, opened: Callable[..., Engine]
) -> None:
    partition("num_clients=4", "partition.alpha=0.3", "seed=5", "--out=first")
    file = tmp_path / "first/partition.json"
    before = file.read_bytes()
    replay = ["num_clients=4", "partition=saved", f"partition.file={file}"]
    text = partition(*replay, "--out", "first")
    assert f"saved {tmp_path}/first/partition.png\n" in text
    assert file.read_bytes() == before  # not written over
    saved = json.loads(before)
    assert saved["partition"] == "Dirichlet(column=None, min_size=10, alpha=0.3)"
    assert saved["seed"] == 5
    engine = opened(*replay, "seed=9")
    assert [rows.tolist() for rows in engine.rows.by_client] == saved["clients"]


def test_another_column_than_the_labels(partition: Command, tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "authors"
    for split in ("train", "validation", "test"):
        authors = ["ann", "bob", "cid", "dee", "eve"]
        rows = {
            "text": [f"row {i}" for i in range(60)],
            "label": ["a", "b"] * 30,
            "author": [authors[i % 4] for i in range(59)] + ["eve"],
        }
        datasets.Dataset.from_dict(rows).to_parquet(str(folder / f"{split}.parquet"))
    overrides = [f"data.path={folder}", "partition=natural", "partition.column=author"]
    holdings = json.loads(partition("--json", *overrides, "num_clients=4"))
    assert holdings["labels"] == ["ann", "bob", "cid", "dee", "eve"]
    assert holdings["counts"] == np.pad(np.diag([15, 15, 15, 14]), ((0, 0), (0, 1))).tolist()
    text = partition(*overrides, "num_clients=4")
    assert "training rows by client and author" in text
    assert "1 of 60 training rows are no client's" in text
    assert json.loads((tmp_path / "partition.json").read_text())["column"] == "author"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["partition=natural"], "partition.column is not set"),
        (["partition=natural", "partition.column=x"], "partition.column=x is no column of"),
        (["partition=saved"], "partition.file is not set"),
        (["partition=saved", "partition.file=/none.json"], "/none.json cannot be read: No such"),
        (["partition=pathological", "partition.classes_per_client=5"], "but there are 4 labels"),
        (["num_clients=25"], "240 training rows cannot give num_clients=25 at least 10 each"),
        (["--out"], "--out needs a value"),
    ],
)
def test_errors_are_one_sentence(
    partition: Command, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        partition(*arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("fedpeft: ") and error.count("\n") == 1


@pytest.mark.parametrize("name", ["iid", "pathological", "quantity", "equal_size"])
def test_every_partition_by_name(partition: Command, name: str) -> None:
    counts = np.array(counts_of(partition("--json", f"partition={name}", "num_clients=6")))
    assert counts.shape == (6, 4) and counts.sum() == 240
    if name in ("iid", "equal_size"):
        assert (counts.sum(1) == 40).all()


# --- large tables and pictures -------------------------------------------------------------------


def test_cells_of_many_clients() -> None:
    counts = np.stack([np.arange(100), np.ones(100, int)], axis=1)
    header, cells = holding_cells(counts, ["a", "b"])
    assert header == ("client", "rows", "a", "b")
    assert cells[0] == ["0", "1", "0", "1"] and cells[19] == ["19", "20", "19", "1"]
    assert cells[20:] == [
        ["80 more: min / median / max", "21 / 60 / 100", "", ""],
        ["all", "5050", "4950", "100"],
    ]
    assert len(holding_cells(counts[:30], ["a", "b"])[1]) == 31
    assert len(holding_cells(counts[:31], ["a", "b"])[1]) == 22


def test_cells_of_many_labels() -> None:
    counts = np.zeros((2, 31), int)
    counts[0, 7], counts[0, 9], counts[1, 30] = 5, 6, 8
    header, cells = holding_cells(counts, [f"[n{i}]" for i in range(31)])
    assert header == ("client", "rows", "labels", "commonest", "its rows")
    assert cells == [
        ["0", "11", "2", "[n9]", "6"],
        ["1", "8", "1", "[n30]", "8"],
        ["all", "19", "3", "[n30]", "8"],
    ]
    assert len(holding_cells(counts[:, :30], [""] * 30)[0]) == 32


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """``drawn(counts, labels)`` gives the figure that ``plot_partition`` saved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures: list[Any] = []

    def draw(counts: np.ndarray, labels: Sequence[str]) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(pyplot, "close", figures.append)
            plot_partition([tmp_path / "p.png"], counts, labels)
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    yield draw
    for figure in figures:
        pyplot.close(figure)


@pytest.mark.parametrize(
    ("clients", "labels", "inches"),
    [
        (1, 1, (3.2, 2.15)),
        (10, 10, (9.5, 5.3)),
        (100, 10, (9.5, 14.8)),
        (10, 100, (17.5, 5.3)),
        (3000, 2, (3.9, 15.8)),
        (2, 300, (22.5, 2.5)),
    ],
)
def test_pictures_stay_readable(
    drawn: Callable[..., Any], clients: int, labels: int, inches: tuple[float, float]
) -> None:
    counts = np.random.default_rng(0).poisson(3, (clients, labels))
    figure = drawn(counts, [f"$\\nope$ {i} of a name that is too long" for i in range(labels)])
    assert figure.get_size_inches().tolist() == pytest.approx(inches)
    axis = figure.axes[0]
    rows, columns = axis.get_yticks(), axis.get_xticks()
    assert (inches[1] - 1.8) / len(rows) >= 0.119 and (inches[0] - 2.5) / len(columns) >= 0.119
    assert len(rows) >= min(clients, 50) and len(columns) >= min(labels, 50)
    name = axis.get_xticklabels()[-1].get_text()
    whole = f"$\\nope$ {columns[-1]} of a name that is too long"
    assert name == f"{whole[:11]}…{whole[-12:]}"
    assert len(axis.texts) == (counts.size if clients <= 40 and labels <= 30 else 0)


def test_a_picture_shows_the_counts(drawn: Callable[..., Any]) -> None:
    counts = np.array([[0, 50, 7], [900, 0, 400]])
    axis = drawn(counts, ["a", "b", "c"]).axes[0]
    image = axis.images[0]
    assert image.get_array().tolist() == counts.tolist()
    shades = image.cmap(image.norm(counts))[..., :3].sum(-1)  # white is 3
    assert np.argsort(-shades, axis=None, kind="stable").tolist() == [0, 4, 2, 1, 5, 3]
    assert {(t.get_position(), t.get_text()) for t in axis.texts} == {
        ((j, i), str(count)) for (i, j), count in np.ndenumerate(counts)
    }
    assert {t.get_text(): t.get_color() for t in axis.texts} == {
        **{"0": "k", "7": "k", "50": "k"},
        **{"400": "w", "900": "w"},
    }
    assert [t.get_text() for t in axis.get_xticklabels()] == ["a", "b", "c"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("label", "client")


@pytest.mark.parametrize(
    ("scheme", "names"),
    [
        (Dirichlet(), ["partition.png", "partition.json"]),
        (Saved(file="x"), ["partition.png"]),
    ],
)
def test_a_saved_partition_is_not_saved_again(
    scheme: Partition, names: list[str], tmp_path: Path
) -> None:
    rows = [np.arange(3), np.arange(3, 6)]
    config: Any = SimpleNamespace(partition=scheme, seed=0)
    assert Holdings(config, np.zeros(6, int), ["a"], rows).save(tmp_path / "out") == names
