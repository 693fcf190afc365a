"""The order in which a client sees its rows in a round, and how batches are padded."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpeft.data.batching import (
    Batch,
    Examples,
    by_length,
    flat,
    lengthened,
    merged,
    training_batches,
    within,
)
from fedpeft.engine.engine import Engine
from fedpeft.seeding import generator
from fedpeft.state import State
from tests.conftest import job_of
from tests.rows import labelled

LENGTHS = np.random.default_rng(0).integers(3, 60, size=53)


def draw(
    steps: int | None = None,
    epochs: int | None = None,
    bucket: bool = True,
    rows: int = 53,
    batch_size: int = 8,
    path: tuple[int, int, int] = (0, 1, 2),
) -> list[list[int]]:
    """Return the row numbers of each training batch.

    Args:
        steps: batches to draw; null if ``epochs`` decides.
        epochs: passes over all rows; null if ``steps`` decides.
        bucket: join rows of similar lengths.
        rows: use so many of ``LENGTHS``.
        batch_size: rows a batch.
        path: seed, round and client, from which the order is drawn.
    """
    rng = generator(path[0], "batches", *path[1:])
    batches = training_batches(LENGTHS[:rows], batch_size, steps, epochs, rng, bucket)
    return [batch.tolist() for batch in batches]


def rows_of(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize("epochs", [1, 3])
def test_an_epoch_covers_every_row_once(bucket: bool, epochs: int) -> None:
    batches = draw(epochs=epochs, bucket=bucket)
    assert len(batches) == 7 * epochs  # 53 rows in batches of 8
    for epoch in range(epochs):
        part = batches[7 * epoch : 7 * (epoch + 1)]
        assert sorted(rows_of(part)) == list(range(53))
        assert sorted(map(len, part)) == [5] + [8] * 6


@pytest.mark.parametrize("bucket", [True, False])
def test_epochs_differ(bucket: bool) -> None:
    batches = draw(epochs=2, bucket=bucket)
    assert batches[:7] != batches[7:]


@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 7, 8, 20])
def test_steps_are_exact(bucket: bool, steps: int) -> None:
    batches = draw(steps=steps, bucket=bucket)
    assert len(batches) == steps
    for batch in batches:
        assert len(set(batch)) == len(batch)
    for start in range(0, steps, 7):  # no row twice before every row was seen
        seen = rows_of(batches[start : start + 7])
        assert len(set(seen)) == len(seen)
        assert len(seen) == (53 if steps - start >= 7 else 8 * (steps - start))


@pytest.mark.parametrize("bucket", [True, False])
def test_few_rows(bucket: bool) -> None:
    assert [sorted(b) for b in draw(steps=3, rows=5, bucket=bucket)] == [[0, 1, 2, 3, 4]] * 3
    assert draw(epochs=2, rows=1, bucket=bucket) == [[0], [0]]


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="a client needs at least one training row, got 0"):
        draw(steps=1, rows=0)


@pytest.mark.parametrize("bucket", [True, False])
def test_order_by_seed_round_and_client(bucket: bool) -> None:
    """Equal (seed, round, client) give the same order, any other another."""
    first = draw(steps=5, bucket=bucket)
    assert first == draw(steps=5, bucket=bucket)
    paths = ((1, 1, 2), (0, 2, 2), (0, 1, 3))
    orders = [rows_of(first)]
    orders += [rows_of(draw(steps=5, bucket=bucket, path=path)) for path in paths]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert all(set(a) != set(b) for i, a in enumerate(orders) for b in orders[:i])


def padding(batches: list[list[int]]) -> int:
    """Count the padding tokens of all batches."""
    return sum(int((LENGTHS[b].max() - LENGTHS[b]).sum()) for b in map(np.array, batches))


def test_bucketing_lessens_padding() -> None:
    grouped, plain = draw(epochs=4), draw(epochs=4, bucket=False)
    assert sorted(rows_of(grouped)) == sorted(rows_of(plain))
    assert padding(grouped) < padding(plain) / 3


def test_bucketed_batches_are_not_sorted_by_length() -> None:
    longest = [LENGTHS[batch].max() for batch in draw(epochs=1)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_by_length_is_stable() -> None:
    lengths = np.array([4, 2, 4, 2, 9, 4])
    batches = by_length(np.array([5, 4, 3, 2, 1, 0]), lengths, 4)
    assert [batch.tolist() for batch in batches] == [[3, 1, 5, 2], [0, 4]]


# --- padding ------------------------------------------------------------------------------------


def test_batch_pads_right_and_masks() -> None:
    rows = labelled([[7, 8], [9], [1, 2, 3], [4, 5, 6, 6]], [1, 0, 2, 3], 99)
    assert len(rows) == 4 and rows.lengths.tolist() == [2, 1, 3, 4]
    batch = rows.batch(np.array([2, 1, 0]))
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 99, 99], [7, 8, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["labels"].tolist() == [2, 0, 1] and batch["row"].tolist() == [2, 1, 0]
    assert set(batch) == {"input_ids", "attention_mask", "labels", "row"}
    assert {v.dtype for v in batch.values()} == {torch.int64}
    assert rows.batch(np.array([1]))["attention_mask"].tolist() == [[1]]


def test_a_padding_token_in_the_text_is_not_masked() -> None:
    batch = labelled([[0, 5, 0], [5]], [0, 0], 0).batch(np.array([0, 1]))
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


CHOICES = flat([[1], [2, 2], [3, 3, 3], [4], [5, 5], [6]]) | {
    "groups": np.array([0, 2, 5, 6]),  # rows of two, three and one sequences
    "prompts": np.array([0, 1, 2, 0, 1, 0]),
    "right": np.array([True, False, False, True, True, True]),
    "score": np.array([0.5, 1.5, 2.5], np.float32),
    "cut_prompt": np.array([True, False, False]),
}


def test_rows_of_several_sequences() -> None:
    rows = Examples.whole(CHOICES, "test", 9)
    assert len(rows) == 3 and rows.lengths.tolist() == [2, 3, 1]
    assert rows.sequences.tolist() == [2, 3, 1]
    batch = rows.batch(np.array([2, 0]))
    assert batch["input_ids"].tolist() == [[6, 9], [1, 9], [2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 0], [1, 1]]
    assert batch["choices"].tolist() == [1, 2] and batch["row"].tolist() == [2, 0]
    assert batch["prompts"].tolist() == [0, 0, 1]
    assert batch["right"].tolist() == [True, True, False]
    assert batch["score"].tolist() == [2.5, 0.5] and batch["score"].dtype == torch.float32
    assert "cut_prompt" not in batch and "groups" not in batch


def test_a_choice_of_rows_keeps_their_numbers() -> None:
    rows = Examples.whole(CHOICES, "train", 9).select(np.array([2, 0]))
    assert len(rows) == 2 and rows.lengths.tolist() == [1, 2] and rows.split == "train"
    batch = rows.batch(np.array([1]))
    assert batch["row"].tolist() == [0]
    assert batch["input_ids"].tolist() == [[1, 9], [2, 2]]


def test_rows_without_tokens() -> None:
    arrays = {"pixels": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": np.arange(3)}
    rows = Examples.whole(arrays, "train", 0)
    assert rows.lengths.tolist() == [0, 0, 0] and rows.sequences.tolist() == [1, 1, 1]
    batch = rows.batch(np.array([1]))
    assert batch["pixels"].tolist() == [[4, 5, 6, 7]] and batch["pixels"].dtype == torch.uint8
    assert set(batch) == {"row", "pixels", "labels"}


def test_batches_of_mapped_arrays_can_be_written(tmp_path: Path) -> None:
    """A training loop may change a batch in place, but never the arrays on disk."""
    mapped: dict[str, np.ndarray] = {}
    for name, array in CHOICES.items():
        np.save(tmp_path / f"{name}.npy", array)
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    rows = Examples.whole(mapped, "test", 9)
    for batch in (rows.batch(np.arange(3)), rows.batch(np.array([1]))):
        for value in batch.values():
            value.zero_()
    assert rows.batch(np.array([1]))["input_ids"].tolist()[0] == [3, 3, 3]


def test_evaluation_counts_every_sequence() -> None:
    """The limit of 72 tokens a batch holds for all candidates of its rows and their padding.

    The rows have 2 candidates of 10 tokens, 4 of 12, and 30 of 11.
    """
    lengths, sequences = np.array([10, 12, 11]), np.array([2, 4, 30])
    assert [b.tolist() for b in within(lengths, 8, 72, sequences)] == [[0], [2], [1]]
    assert [b.tolist() for b in within(lengths, 8, 72)] == [[0, 2, 1]]
    assert [b.tolist() for b in within(lengths, 8, 352, sequences)] == [[0, 2], [1]]
    assert [b.tolist() for b in within(lengths, 8, 351, sequences)] == [[0], [2], [1]]


def test_padding_does_not_change_the_logits(opened: Callable[..., Engine]) -> None:
    engine = opened()
    rows, model = engine.rows.examples("test"), engine.replica.model
    engine.replica.load()
    shortest, longest = int(rows.lengths.argmin()), int(rows.lengths.argmax())
    assert rows.lengths[longest] > rows.lengths[shortest] + 5

    def loss(batch: Batch) -> float:
        model.eval()
        with torch.no_grad():
            output = engine.task.forward(model, batch)
            return float(engine.task.evaluate_batch(output, batch)["loss"][0])

    alone = loss(rows.batch(np.array([shortest])))
    beside = loss(rows.batch(np.array([shortest, longest])))
    assert beside == pytest.approx(alone, rel=1e-5)


# --- with an engine ------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches of the last training, which does nothing else."""
    batches: list[Batch] = []

    def record(_: object, steps: list[list[Batch]], *rest: object) -> tuple[float, State]:
        batches[:] = [batch for parts in steps for batch in parts]
        return 0.0, {}

    monkeypatch.setattr("fedpeft.engine.engine.train", record)
    return batches


def tokens(batches: list[Batch]) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in batches]


def test_a_client_s_batches_by_round(opened: Callable[..., Engine], seen: list[Batch]) -> None:
    """The batches differ by client, round and seed, and do not depend on what trained before."""
    engine, other_seed = opened("local_steps=3"), opened("local_steps=3", "seed=1")
    batches: dict[tuple[int, int], list[list[list[int]]]] = {}
    for client in (0, 1):
        for round in (1, 2):
            trained = engine.train_client(job_of(engine, client, round)).trained
            batches[client, round] = tokens(seen)
            assert trained.num_examples == len(engine.rows.client_examples(client)["train"])
            assert [len(batch) for batch in batches[client, round]] == [8, 8, 8]
    assert all(batches[a] != batches[b] for a in batches for b in batches if a != b)
    engine.train_client(job_of(engine, 0, 1))
    assert tokens(seen) == batches[0, 1]
    other_seed.train_client(job_of(other_seed, 0, 1))
    assert tokens(seen) != batches[0, 1]


def test_local_epochs(opened: Callable[..., Engine], seen: list[Batch]) -> None:
    engine = opened("local_steps=null", "local_epochs=2")
    number = engine.train_client(job_of(engine, 1, 1)).trained.num_examples
    examples = engine.rows.client_examples(1)["train"]
    assert number == len(examples)
    assert sum(len(batch["labels"]) for batch in seen) == 2 * number
    assert sum(int(batch["attention_mask"].sum()) for batch in seen) == 2 * examples.lengths.sum()


def test_batches_are_a_client_s_own_rows(opened: Callable[..., Engine], seen: list[Batch]) -> None:
    engine = opened("local_steps=null", "local_epochs=1")
    for client in range(3):
        engine.train_client(job_of(engine, client, 1))
        examples = engine.rows.client_examples(client)["train"]
        tokens, offsets = examples.arrays["tokens"], examples.arrays["offsets"]
        expected = sorted(tokens[offsets[row] : offsets[row + 1]].tolist() for row in examples.rows)
        sequences = sorted(
            row[: int(mask.sum())].tolist()
            for batch in seen
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        )
        assert sequences == expected, f"client {client}"


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 8), (8, 8), (9, 16), (33, 40), (64, 64), (65, 80), (130, 160)]
)
def test_a_batch_is_lengthened_to_one_of_few_lengths(length: int, expected: int) -> None:
    ids = torch.full((2, length), 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "row": torch.tensor([3, 4])}
    longer = lengthened(batch, 9)
    assert longer["input_ids"].tolist() == [[5] * length + [9] * (expected - length)] * 2
    assert longer["attention_mask"].sum(1).tolist() == [length, length]
    assert longer["attention_mask"].shape == longer["input_ids"].shape
    assert longer["row"].tolist() == [3, 4]


def test_images_have_no_length() -> None:
    pixels = {"pixels": torch.zeros(1, 3)}
    assert lengthened(pixels, 9) is pixels


def test_merged_batches_are_padded_with_the_given_token() -> None:
    batches = [
        {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long()}
        for row in ([1, 2], [3, 4, 5])
    ]
    batch = merged(batches, 9)
    assert batch["input_ids"].tolist() == [[1, 2, 9], [3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
