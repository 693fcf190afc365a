"""Classification, regression and language modelling of texts: labels, encoding and metrics."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from rich.console import Console
from torch import Tensor

from fedpeft.config.load import load_config
from fedpeft.data.tasks.language import LanguageModelling
from fedpeft.data.tasks.text import Regression, TextClassification
from fedpeft.engine.engine import Engine
from fedpeft.reporting.progress import Display
from fedpeft.simulation import launch
from tests.conftest import Runner
from tests.data.files import Rows, write
from tests.data.shortcuts import error_of
from tests.data.stand_ins import Logits

NOTHING = Dataset.from_dict({})


def rows(*labels: Any) -> Rows:
    return [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]


def task_of(folder: Path, *labels: Any, test: Rows | None = None, **fields: Any) -> Any:
    """Return a classification task.

    Args:
        folder: folder into which the task's tables are written.
        labels: labels of the training rows, which also validate.
        test: rows of the test split; the training rows by default.
        fields: fields of ``TextClassification``.
    """
    train = rows(*labels)
    path = write(folder, train=train, validation=train, test=test or train)
    return TextClassification(path=path, **fields)


def numbers(task: TextClassification, split: str = "train") -> list[int]:
    return task.class_numbers(task.split_rows(split)).tolist()


def batch_of(labels: list[Any], ids: list[list[int]] | None = None) -> dict[str, Tensor]:
    """Return a batch with these labels.

    Args:
        labels: class numbers or targets, one a row.
        ids: tokens, of which 0 is padding; one token a row by default.
    """
    input_ids = torch.tensor(ids or [[1]] * len(labels))
    return {
        "row": torch.arange(len(labels)),
        "input_ids": input_ids,
        "attention_mask": (input_ids != 0).long(),
        "labels": torch.tensor(labels),
    }


# --- labels -------------------------------------------------------------------------------------


def test_labels_are_sorted(tmp_path: Path) -> None:
    task = task_of(tmp_path, "weather", "sport", "weather", "sport")
    assert task.label_names == ["sport", "weather"] and task.num_labels == 2
    assert numbers(task) == [1, 0, 1, 0]


def test_labels_in_the_configured_order(tmp_path: Path) -> None:
    task = task_of(tmp_path, "weather", "sport", labels=["weather", "sport", "food"])
    assert task.num_labels == 3
    assert numbers(task) == [0, 1]


def test_numbers_as_labels(tmp_path: Path) -> None:
    task = task_of(tmp_path / "a", 2, 0, 1)
    assert task.label_names == ["0", "1", "2"]
    assert numbers(task) == [2, 0, 1]
    named = task_of(tmp_path / "b", 2, 0, 1, labels=["x", "y", "z"])
    assert numbers(named) == [2, 0, 1]


def test_numbers_that_are_names(tmp_path: Path) -> None:
    """Labels 1, 3 and 7 have a gap, so they are names, not positions."""
    task = task_of(tmp_path / "a", 3, 1, 7)
    assert task.label_names == ["1", "3", "7"]
    assert numbers(task) == [1, 0, 2]
    ordered = task_of(tmp_path / "b", 3, 1, 7, labels=["7", "3", "1"])
    assert numbers(ordered) == [1, 2, 0]


def test_truth_values_as_labels(tmp_path: Path) -> None:
    task = task_of(tmp_path, True, False, True)
    assert task.label_names == ["False", "True"]
    assert numbers(task) == [1, 0, 1]


def test_a_class_label_column(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["1", "0"])})
    for split in ("train", "validation", "test"):
        table = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1]}, features)
        table.to_parquet(str(tmp_path / f"{split}.parquet"))
    task = TextClassification(path=str(tmp_path))
    assert task.label_names == ["1", "0"]
    assert numbers(task, "test") == [0, 1, 1]
    assert numbers(TextClassification(path=str(tmp_path), labels=["no", "yes"])) == [0, 1, 1]
    groups, names = task.grouped(None)
    assert (groups.tolist(), names) == ([0, 1, 1], ["1", "0"])


def test_some_names_of_a_class_label_column(tmp_path: Path) -> None:
    """With three of four classes in another order, each row keeps the name that the data gives."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c", "d"])})
    for split in ("train", "validation", "test"):
        columns = {"text": ["v", "w", "x", "y", "z"], "label": [3, 0, 2, 1, -1]}
        Dataset.from_dict(columns, features).to_parquet(str(tmp_path / f"{split}.parquet"))
    task = TextClassification(path=str(tmp_path), labels=["d", "a", "b"], bad_rows="skip")
    assert numbers(task, "test") == [0, 1, 2]
    assert list(task.split_rows("test")["text"]) == ["v", "w", "y"]
    assert sum(task.skipped.values()) == 2


def test_a_class_label_column_that_lacks_a_class_keeps_its_names(tmp_path: Path) -> None:
    """Its numbers are not those of train, and no note calls its names others."""
    for split, names in (("train", ["a", "b", "c"]), ("validation", ["c"]), ("test", ["c", "a"])):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        columns = {"text": list("xyz"[: len(names)]), "label": list(range(len(names)))}
        Dataset.from_dict(columns, features).to_parquet(str(tmp_path / f"{split}.parquet"))
    task = TextClassification(path=str(tmp_path))
    assert (numbers(task, "validation"), numbers(task, "test")) == ([2], [2, 0])
    assert task.notes() == []
    (note,) = TextClassification(path=str(tmp_path), labels=["x", "y", "z"]).notes_on("test")
    assert note == (
        "column label has other class names than data.labels, so they are taken in their order: "
        "c counts as x, a counts as y"
    )


def test_numbers_where_train_has_names_are_said_to_be_places(tmp_path: Path) -> None:
    train = [{"text": "x", "label": "neg"}, {"text": "y", "label": "pos"}]
    path = write(tmp_path, train=train, validation=train, test=[{"text": "z", "label": 1}])
    task = TextClassification(path=path)
    assert numbers(task, "test") == [1]
    says = "numbers in place of the names of train, so they are taken in their order: 0 counts as "
    assert task.notes() == [f"column label has {says}neg, 1 counts as pos"]
    assert not TextClassification(path=path, labels=["neg", "pos"]).notes()  # its user says so


def test_groups_keep_classes_without_a_row(tmp_path: Path) -> None:
    task = task_of(tmp_path, "b", "a", "b", labels=["a", "b", "c"])
    for column in (None, "label"):  # null stands for the label's column
        groups, names = task.grouped(column)
        assert (groups.tolist(), names) == ([1, 0, 1], ["a", "b", "c"])
    groups, names = task.grouped("text")
    assert (groups.tolist(), names) == ([0, 1, 2], ["t0", "t1", "t2"])


NO_ROW = "mend it, or leave such rows out with data.bad_rows=skip"
UNKNOWN = {
    "text": (["art"], {}, "text"),
    "null": ([None], {}, "nothing"),
    "number": ([0, 2], {"labels": ["p", "q"]}, "a whole number"),
    "hidden": ([1, -1], {"labels": ["p", "q"]}, "a whole number"),
    "gap": ([0, None], {"labels": ["p", "q"]}, "nothing"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_label(tmp_path: Path, case: str) -> None:
    labels, fields, kind = UNKNOWN[case]
    known_from = "data.labels" if fields else "train"
    reason = f"{kind} in label, must be one of the 2 labels of {known_from}"
    known = [0, 1] if fields else ["sport", "weather"]
    task = task_of(tmp_path, *known, test=rows(*labels), **fields)
    wrong = len(labels) - 1
    error = error_of(lambda: task.split_rows("test"))
    assert error == f"row {wrong + 1} of test (line {wrong + 1}) has {reason}: {NO_ROW}"
    skipping = TextClassification(path=task.path, bad_rows="skip", **fields)
    if wrong:  # row 0 has a known label
        assert len(skipping.split_rows("test")) == 1
        assert skipping.fingerprint()["skipped"] == {f"has {reason}": 1}


def test_one_class_alone(tmp_path: Path) -> None:
    task = task_of(tmp_path, "food", "food")
    assert error_of(lambda: task.num_labels) == (
        f"column label of {tmp_path} has fewer than two labels, but classification needs two"
    )


def test_a_task_that_needs_its_label() -> None:
    error = error_of(lambda: TextClassification(label=None).target)
    assert error == "data.label is not set: TextClassification needs it"


# --- encoding -----------------------------------------------------------------------------------


def test_encode_truncates(opened: Callable[..., Engine]) -> None:
    engine = opened("data.max_length=6")
    examples, tokenizer = engine.rows.examples("test"), engine.replica.processor
    assert examples.lengths.max() == 6 and examples.lengths.min() >= 3
    first = engine.task.split_rows("test")["text"][0].split()[:4]
    ids = examples.arrays["tokens"][: examples.arrays["offsets"][1]].tolist()
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", *first, "[SEP]"]
    assert examples.pad_id == tokenizer.pad_token_id == 0 and examples.split == "test"
    expected = engine.task.class_numbers(engine.task.split_rows("test"))
    assert examples.labels.tolist() == expected.tolist()
    examples = opened("data.max_length=12").rows.examples("test")
    long = [len(text.split()) > 10 for text in engine.task.split_rows("test")["text"]]
    assert examples.arrays["cut_text"].tolist() == long and 0 < sum(long) < len(long)


def test_a_summary_counts_the_texts_that_were_cut(run: Runner) -> None:
    assert run("num_rounds=1")["data"]["cut"] == {}
    cut = run("num_rounds=1", "data.max_length=6")["data"]["cut"]
    assert cut.keys() == {"train", "validation", "test"} and cut["test"]["cut_text"] > 20


def test_texts_that_are_cut_are_counted_before_round_0(base: list[str], tmp_path: Path) -> None:
    def shown(*overrides: str) -> tuple[Any, list[str]]:
        text = StringIO()
        display = Display(Console(file=text, soft_wrap=True))
        run_dir = f"run_dir={tmp_path / str(len(overrides))}"
        summary = launch.run([*base, "num_rounds=1", run_dir, *overrides], display)
        return summary["data"]["cut"], text.getvalue().splitlines()

    assert not [line for line in shown()[1] if "max_length" in line]
    cut, lines = shown("data.max_length=6")
    count = cut["train"]["cut_text"]
    assert lines[1].startswith("note: cut, because they are longer than data.max_length allows: ")
    assert f" {count} of 240 texts in train ({count / 2.4:.1f}%), " in lines[1]
    assert lines[2].startswith("round 0/1")


def test_encode_a_pair(base: list[str], tmp_path: Path) -> None:
    pairs = [{"text": "the goal", "two": "and rain", "label": v} for v in "xy"]
    path = write(tmp_path / "pair", train=pairs, validation=pairs, test=pairs)
    config = load_config([*base, f"data.path={path}", "data.text_pair=two"])
    tokenizer = config.model.tokenizer()
    examples = config.data.encode("test", tokenizer)
    ids = examples.arrays["tokens"][: examples.arrays["offsets"][1]].tolist()
    assert tokenizer.convert_ids_to_tokens(ids) == (
        ["[CLS]", "the", "goal", "[SEP]", "and", "rain", "[SEP]"]
    )


# --- metrics by hand ----------------------------------------------------------------------------


def test_classification_metrics_by_hand() -> None:
    task = TextClassification(labels=["a", "b", "c"])
    batch = batch_of([0, 0, 1, 2])
    # predicts 0, 1, 1, 0 with probability 1/2 against 1/4 and 1/4
    model = Logits(torch.log(torch.tensor([[2.0, 1, 1], [1, 2, 1], [1, 2, 1], [2, 1, 1]])))
    whole = task.evaluate_batch(task.forward(model, batch), batch)
    assert whole["prediction"].tolist() == [0, 1, 1, 0]
    loss = (2 * np.log(2) + 2 * np.log(4)) / 4
    parts = [{k: v[:3] for k, v in whole.items()}, {k: v[3:] for k, v in whole.items()}]
    metrics = task.score(parts, NOTHING, None)
    assert set(metrics) == {"loss", "accuracy", "f1_macro"}
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["accuracy"] == 0.5
    # F1: a 1/2 (precision 1/2, recall 1/2), b 2/3 (1/2, 1), c 0
    assert metrics["f1_macro"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert float(task.loss(task.forward(model, batch), batch)) == pytest.approx(loss, rel=1e-6)


def test_configured_metrics_by_hand() -> None:
    """MRPC's and CoLA's metrics of 2 hits, 1 false alarm, 1 miss and 1 right rejection."""
    task = TextClassification(labels=["no", "yes"], metrics=["matthews", "f1"])
    batch = batch_of([1, 1, 0, 1, 0])
    model = Logits([[0.0, 1], [0, 1], [0, 1], [1, 0], [1, 0]])
    measures = task.evaluate_batch(task.forward(model, batch), batch)
    metrics = task.score([measures], NOTHING, None)
    assert set(metrics) == {"loss", "matthews", "f1"} and task.selects == ("matthews", 1)
    assert metrics["f1"] == pytest.approx(2 / 3)  # precision 2/3, recall 2/3
    assert metrics["matthews"] == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))


def test_f1_is_of_two_classes(tmp_path: Path) -> None:
    """With more a run would end at its first evaluation, or a client measure another thing."""
    path = write(tmp_path, train=[{"text": "rain", "label": name} for name in "abc"])
    for given in ({"labels": ["a", "b", "c"]}, {"path": path}):
        task = TextClassification(metrics=["f1"], **given)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="second of two classes, got 3 classes: choose f1_"):
            _ = task.num_labels
    assert TextClassification(metrics=["f1"], labels=["a", "b"]).num_labels == 2


def test_baseline_answers_the_commonest_training_label() -> None:
    task = TextClassification(labels=["a", "b", "c"])
    train, test = np.array([1, 1, 2, 0, 1]), np.array([1, 2, 2, 2])
    assert task.baseline(train, test) == 0.25  # 0.75 if the measured rows chose the label


def test_regression_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path, train=rows(0.0, 2.5, 5), test=rows(1))
    task = Regression(path=path, validation_split="test")
    assert task.num_labels == 1 and task.selects == ("spearman", 1)
    assert task.headline == "spearman" and task.baseline(np.zeros(2), np.ones(2)) is None
    batch = batch_of([0.0, 2.5, 5.0])
    model = Logits([[1.0], [2.0], [9.0]])
    measures = task.evaluate_batch(task.forward(model, batch), batch)
    assert measures["prediction"].tolist() == [1, 2, 9]  # the outputs, not their argmax
    metrics = task.score([measures], task.train_rows, None)
    assert set(metrics) == {"loss", "spearman", "pearson"}
    assert metrics["loss"] == pytest.approx((1 + 0.25 + 16) / 3)
    assert metrics["spearman"] == pytest.approx(1)  # the same order
    # deviations (-2.5, 0, 2.5) and (-3, -2, 5): 20 / sqrt(12.5 * 38)
    assert metrics["pearson"] == pytest.approx(20 / np.sqrt(12.5 * 38))
    assert float(task.loss(task.forward(model, batch), batch)) == pytest.approx(metrics["loss"])


def test_metrics_of_classification_are_refused_for_a_regression() -> None:
    assert error_of(lambda: Regression(metrics=["accuracy"])) == (
        "data.metrics of Regression must be of spearman, pearson, or a module of evaluate, such as "
        "/folder/my_metric or evaluate:NAME, got accuracy"
    )


@pytest.mark.parametrize("value", [None, "much", float("nan"), float("inf")])
def test_a_target_that_is_no_number(tmp_path: Path, value: Any) -> None:
    labels = ["1.5", value] if isinstance(value, str) else [1.5, value]
    Dataset.from_list(rows(*labels)).to_parquet(str(tmp_path / "train.parquet"))
    if isinstance(value, str):  # a column of texts has no numbers at all
        reason = "has text in label, must be a finite number (and 1 rows more)"
        row = 1
    else:
        kind = "nothing" if value is None else "a number that is not finite"
        reason = f"has {kind} in label, must be a finite number"
        row = 2
    error = error_of(lambda: Regression(path=str(tmp_path)).train_rows)
    assert error == f"row {row} of train (counted from 1) {reason}: {NO_ROW}"


def test_a_run_of_a_regression(run: Runner, tmp_path: Path) -> None:
    topics = [("bread cheese", 0.5), ("violin song", 4.5), ("goal team", 2.5)]
    texts = [{"text": f"the {t}", "label": v + i / 40} for i in range(6) for t, v in topics]
    path = write(tmp_path / "r", train=texts, validation=texts[:9], test=texts[9:])
    fields = ["data._target_=fedpeft.data.tasks.text.Regression", f"data.path={path}"]
    summary = run(*fields, "partition=iid", "local_steps=6", "lr=0.01")
    assert summary["selected_by"] == "validation_spearman" and summary["refused"] == {}
    measured = {"test_loss", "test_spearman", "test_pearson"}
    assert {key for key in summary["final"] if key.startswith("test_")} == measured
    losses = [line["validation_loss"] for line in run.lines()]
    assert losses[2] < losses[0] and summary["baseline"] == {}


def test_language_modelling_by_hand() -> None:
    """[3, 1, 2] has two next tokens, and [3, 1, padding] has one."""
    task = LanguageModelling()
    assert task.num_labels is None and task.baseline(np.array([0]), np.array([0])) is None
    batch = batch_of([0, 0], [[3, 1, 2], [3, 1, 0]])
    right, wrong = [0.0, 9.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]
    model = Logits([[right, wrong, wrong], [right, wrong, right]])
    whole = task.evaluate_batch(task.forward(model, batch), batch)
    assert whole["count"].tolist() == [2, 1] and whole["correct"].tolist() == [1, 1]
    low, high = np.log(np.exp(9) + 3) - 9, np.log(np.exp(9) + 3)
    parts = [{k: v[i : i + 1] for k, v in whole.items()} for i in (0, 1)]
    metrics = task.score(parts, NOTHING, None)
    assert metrics["loss"] == pytest.approx((2 * low + high) / 3, rel=1e-5)
    assert metrics["token_accuracy"] == pytest.approx(2 / 3)
    assert float(task.loss(task.forward(model, batch), batch)) == pytest.approx(
        metrics["loss"], rel=1e-5
    )
