"""A saved partition gives the same rows again, or an error that says why not."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.data.partitions.base import Dirichlet, Rows
from fedpeft.data.partitions.saved import Saved, labels_sha256, write_partition

LABELS = np.arange(40) % 4
CLIENTS = [np.arange(5), np.array([39, 7, 20]), np.arange(10, 16)]
Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A partition file of three clients with 14 of 40 rows."""
    path = tmp_path / "partition.json"
    write_partition(path, Dirichlet(0.1), LABELS, 7, CLIENTS)
    return path


def replay(path: Path, labels: np.ndarray = LABELS, clients: int = 3, **fields: Any) -> Rows:
    return Saved(file=str(path), **fields).indices(labels, clients, 0)


def test_the_file_s_contents(file: Path) -> None:
    assert json.loads(file.read_text()) == {
        "format": 1,
        "num_rows": 40,
        "column": None,
        # sha256sum of 40 little-endian int64: 0 1 2 3 0 1 ...
        "labels_sha256": "df62bf67da549684ae37f6202d158f7f6a9226e093c5c9461e2aa7617755c633",
        "num_clients": 3,
        "partition": "Dirichlet(column=None, min_size=10, alpha=0.1)",
        "seed": 7,
        "clients": [[0, 1, 2, 3, 4], [39, 7, 20], [10, 11, 12, 13, 14, 15]],
    }


def test_the_same_rows_in_the_same_order(file: Path) -> None:
    replayed = replay(file)
    assert [rows.tolist() for rows in replayed] == [rows.tolist() for rows in CLIENTS]
    assert {rows.dtype for rows in replayed} == {np.dtype(np.int64)}


def test_a_drawn_partition_comes_back(tmp_path: Path) -> None:
    labels, path = np.arange(400) % 4, tmp_path / "p.json"
    drawn = Dirichlet(0.5).indices(labels, 5, 3)
    write_partition(path, Dirichlet(0.5), labels, 3, drawn)
    replayed = Saved(file=str(path)).indices(labels, 5, 0)  # the run's seed has no influence
    assert all(np.array_equal(a, b) for a, b in zip(replayed, drawn, strict=True))


def test_labels_sha256_sees_every_label() -> None:
    other = LABELS.copy()
    other[39] = 0
    digests = [labels_sha256(x) for x in (LABELS, other, LABELS[:39], LABELS.astype(">i8"))]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]


def test_the_column_is_saved_and_compared(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_partition(path, Dirichlet(column="author"), LABELS, 0, CLIENTS)
    assert len(replay(path, column="author")) == 3
    message = "another column: it was made with partition.column=author, but it is now null"
    with pytest.raises(ValueError, match=re.escape(message)):
        replay(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"labels": np.arange(41) % 4},
            "was made for another num_rows: it is of 40 training rows, but there are 41",
        ),
        (
            {"clients": 4},
            "was made for another num_clients: it is of 3 clients, but num_clients=4",
        ),
        (
            {"column": "author"},
            "was made for another column: it was made with partition.column=null, but it is now "
            "author",
        ),
        (
            {"min_size": 4},
            "gives client 1 3 of 40 rows, but every client needs partition.min_size=4",
        ),
    ],
)
def test_another_run_than_the_file_is_for(file: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'partition.file={file} {message}')}$"):
        replay(file, **fields)


def test_other_labels(file: Path) -> None:
    with pytest.raises(
        ValueError,
        match=rf"partition.file={file} was made for another labels_sha256: it is of other labels "
        r"\(sha256 df62.*\) than now \(\w{64}\)$",
    ):
        replay(file, np.sort(LABELS))


def put(key: str, value: Any) -> Change:
    """Return a change that sets a key of the file."""
    return lambda saved: saved.__setitem__(key, value)


def put_row(client: int, value: Any) -> Change:
    """Return a change that sets a client's first row."""
    return lambda saved: saved["clients"][client].__setitem__(0, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", 2), "was made for another format: it is of format 2, but only 1 is known"),
        (lambda saved: saved.pop("num_rows"), "is no partition file: it has no num_rows"),
        (put("clients", 3), "is no partition file: its clients are no list"),
        (put("clients", [[0, 1, 2], None, []]), "gives client 1 no list of rows, but None"),
        (lambda saved: saved["clients"].pop(), "is of 2 clients, but num_clients=3"),
        (put_row(1, 40), "gives client 1 row number 40, but these numbers go from 0 to 39"),
        (put_row(1, -1), "gives client 1 row number -1, but these numbers go from 0 to 39"),
        (put_row(1, 3), "gives row number 3 (counted from 0) to clients 0 and 1"),
        (put_row(0, 3), "gives row number 3 (counted from 0) to clients 0 and 0"),
        (put_row(2, 1.5), "gives client 2 what is no row number: 1.5"),
        (put_row(2, True), "gives client 2 what is no row number: True"),
        (put_row(2, "7"), "gives client 2 what is no row number: '7'"),
        (put_row(2, 2**63), f"gives client 2 what is no row number: {2**63}"),
        (put_row(2, None), "gives client 2 what is no row number: None"),
    ],
)
def test_a_file_that_was_changed(file: Path, change: Change, message: str) -> None:
    saved = json.loads(file.read_text())
    change(saved)
    file.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=f"^{re.escape(f'partition.file={file} {message}')}$"):
        replay(file)


def test_a_file_without_its_seed_is_read(file: Path) -> None:
    saved = json.loads(file.read_text())
    del saved["seed"]  # only people read it
    file.write_text(json.dumps(saved))
    assert len(replay(file)) == 3


@pytest.mark.parametrize(
    "content", [b"", b'{"format": 1, "num_rows": 40, "cli', b"\xff\xfe\x00", b"[" * 100_000]
)
def test_a_file_that_is_cut_off_or_no_json(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^partition.file={file} is no JSON, or cut off: .+$"):
        replay(file)


@pytest.mark.parametrize("content", ["[]", "3", "{}", "null"])
def test_json_of_something_else(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(
        ValueError, match="is no partition file: it has no format, num_rows, column, labels_sha256"
    ):
        replay(file)


def test_no_file(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    with pytest.raises(ValueError, match=f"^partition.file={path} cannot be read: No such file"):
        replay(path)
    with pytest.raises(ValueError, match=f"^partition.file={tmp_path} cannot be read: Is a dir"):
        replay(tmp_path)
    with pytest.raises(ValueError, match="^partition.file is not set: give one that fedpeft part"):
        Saved().indices(LABELS, 3, 0)
