"""A client keeps a file a generation, and loads exactly the one that the server counts on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict

from fedpeft.client.store import Lost, Store, store_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Generations 1 to 4, whose values are their numbers."""
    store = Store(tmp_path / "client_0")
    for generation in (1, 2, 3, 4):
        store.keep(generation, {"b": torch.full((3,), float(generation))})
    return store


def test_exactly_the_named_generation_is_loaded(store: Store) -> None:
    assert store.load(2)["b"].tolist() == [2.0] * 3
    assert store.load(4)["b"].tolist() == [4.0] * 3
    assert store.load(0) == {}


def test_a_generation_that_is_not_here_is_refused_with_those_that_are(store: Store) -> None:
    with pytest.raises(Lost, match=r"from generation 7 .* but here is 1, 2, 3, 4: start its node"):
        store.load(7)


def test_an_empty_folder_says_none(tmp_path: Path) -> None:
    with pytest.raises(Lost, match="from generation 3 .* but here is none"):
        Store(tmp_path).load(3)


@pytest.mark.parametrize("where", [-1, 20])
def test_a_changed_file_is_refused(store: Store, where: int) -> None:
    path = store.folder / "00003.safetensors"
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    with pytest.raises(Lost, match="generation 3 of this client's kept state: .* is broken"):
        store.load(3)
    assert store.load(2)["b"].tolist() == [2.0] * 3


@pytest.mark.parametrize("size", [0, 5, 60])
def test_a_cut_file_is_refused(store: Store, size: int) -> None:
    path = store.folder / "00003.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(Lost, match="is broken"):
        store.load(3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_that_is_not_finite_is_kept(store: Store, value: float) -> None:
    with pytest.raises(ValueError, match="b holds values that are not finite after training"):
        store.keep(5, {"a": torch.ones(2), "b": torch.tensor([1.0, value])})
    assert store.generations == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("generation", "oldest", "best", "left"),
    [
        (4, 3, 1, [1, 3, 4]),
        (4, 4, 4, [4]),
        (4, 0, 0, [1, 2, 3, 4]),
        (2, 2, 2, [2]),  # 3 and 4 were lost on their way, or come after an older checkpoint
        (0, 0, 0, []),
    ],
)
def test_what_nobody_needs_is_deleted(
    store: Store, generation: int, oldest: int, best: int, left: list[int]
) -> None:
    store.forget(generation, oldest, best)
    assert store.generations == left


def test_a_draft_is_no_generation(store: Store) -> None:
    (store.folder / ".00005.safetensors.1.part").write_bytes(b"half")
    assert store.generations == [1, 2, 3, 4]


def context(**config: Any) -> Context:
    return Context(1, 1, {"partition-id": 0} | config, RecordDict(), {})


RUN = "0123456789abcdef"


def test_the_node_names_the_folder(tmp_path: Path) -> None:
    store = store_of(context(**{"state-folder": str(tmp_path)}), RUN, 3)
    assert store.folder == tmp_path / "0123456789abcdef" / "client_3"


def test_a_node_without_a_folder_uses_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDPEFT_STATE", str(tmp_path))
    assert store_of(context(), RUN, 3).folder == tmp_path / "0123456789abcdef" / "client_3"


@pytest.mark.parametrize("run", ["../../elsewhere", "", "0123", "0123456789ABCDEF", "/etc"])
def test_a_message_chooses_no_folder(run: str) -> None:
    with pytest.raises(ValueError, match="run must be 16 hexadecimal digits"):
        store_of(context(), run, 0)
