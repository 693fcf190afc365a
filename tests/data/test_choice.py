"""Multiple choice: candidates as sequences, scores by row, and rows with several right answers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.data.rows.tables import values
from fedpeft.data.tasks.choice import MultipleChoice
from fedpeft.engine.engine import Engine
from tests.conftest import Runner
from tests.data.files import Rows, write
from tests.data.shortcuts import composed
from tests.data.stand_ins import Logits

COPA: Rows = [
    {"premise": "Snow was old.", "choice1": "The house", "choice2": "A cloud", "question": "cause"}
    | {"label": 1, "idx": 0},
    {"premise": "rain and wind.", "choice1": "the storm", "choice2": "old plate"}
    | {"question": "effect", "label": 0, "idx": 1},
]
RECORD: Rows = [
    {"passage": "rain and snow @highlight wind", "query": "then @placeholder was near", "idx": 0}
    | {"entities": ["rain", "snow", "rain", "wind"], "answers": ["rain", "wind", "rain"]},
    {"passage": "goal and team", "query": "@placeholder", "idx": 1}
    | {"entities": ["goal", "team"], "answers": ["team"]},
]
NO_ROW = "mend it, or leave such rows out with data.bad_rows=skip"
Make = Callable[..., Engine]


def repeated(rows: Rows, times: int = 12) -> Rows:
    return [dict(row) for _ in range(times) for row in rows]


@pytest.fixture
def make_engine(base: list[str], decoder: Path, tmp_path: Path) -> Make:
    """``make_engine("copa", rows)`` gives an engine with these rows on the tiny BERT.

    With ``likelihood=True`` the tiny Llama scores the candidates.
    """

    def make(data: str, rows: Rows, likelihood: bool = False, **fields: Any) -> Engine:
        path = write(tmp_path / data, train=repeated(rows), validation=rows)
        model = [f"model.path={decoder}"] if likelihood else []
        scoring = "likelihood" if likelihood else "head"
        task = replace(composed(f"data={data}").data, path=path, scoring=scoring, **fields)
        return Engine(replace(composed(*base, *model, "method.rank=4"), data=task))

    return make


def sequences(engine: Engine, split: str = "test") -> list[list[str]]:
    """Return the tokens of each candidate of a split."""
    examples = engine.rows.examples(split)
    ids, offsets = examples.arrays["tokens"].tolist(), examples.arrays["offsets"].tolist()
    pairs = zip(offsets, offsets[1:], strict=False)
    return [engine.replica.processor.convert_ids_to_tokens(ids[a:b]) for a, b in pairs]


# --- encoding -----------------------------------------------------------------------------------


def test_pairs_for_an_encoder(make_engine: Make) -> None:
    engine = make_engine("copa", COPA)
    because = so = "[UNK]"  # the tiny BERT's vocabulary has neither
    assert sequences(engine) == [
        ["[CLS]", "snow", "was", "old", because, "[SEP]", "the", "house", "[SEP]"],
        ["[CLS]", "snow", "was", "old", because, "[SEP]", "a", "cloud", "[SEP]"],
        ["[CLS]", "rain", "and", "wind", so, "[SEP]", "the", "storm", "[SEP]"],
        ["[CLS]", "rain", "and", "wind", so, "[SEP]", "old", "plate", "[SEP]"],
    ]
    arrays = engine.rows.examples("test").arrays
    assert arrays["groups"].tolist() == [0, 2, 4]
    assert arrays["right"].tolist() == [False, True, True, False]
    assert engine.task.num_labels == 1 and engine.task.auto_class.endswith("SequenceClassification")
    assert engine.task.selects == ("accuracy", 1)


def test_continuations_for_a_decoder(make_engine: Make) -> None:
    engine = make_engine("copa", COPA[1:], likelihood=True)
    assert sequences(engine) == [
        ["<s>", "rain", "and", "wind", "so", "the", "storm"],
        ["<s>", "rain", "and", "wind", "so", "old", "plate"],
    ]
    assert engine.rows.examples("test").arrays["prompts"].tolist() == [5, 5]
    assert engine.task.num_labels is None and engine.task.auto_class == "AutoModelForCausalLM"


def test_entities_that_fill_the_gap(make_engine: Make) -> None:
    """An entity that is listed twice is one candidate; two of the first row's three are right."""
    engine = make_engine("record", RECORD, likelihood=True)
    passage = ["<s>", "rain", "and", "snow", "wind"]
    assert sequences(engine) == [
        [*passage, "then", "rain", "was", "near"],
        [*passage, "then", "snow", "was", "near"],
        [*passage, "then", "wind", "was", "near"],
        ["<s>", "goal", "and", "team", "goal"],
        ["<s>", "goal", "and", "team", "team"],
    ]
    arrays = engine.rows.examples("test").arrays
    assert arrays["groups"].tolist() == [0, 3, 5]
    assert arrays["right"].tolist() == [True, False, True, False, True]
    assert arrays["prompts"].tolist() == [5, 5, 5, 4, 4]
    groups, names = engine.task.grouped(None)
    assert names == ["all"] and len(groups) == len(engine.task.train_rows)


def test_cuts_are_counted_by_row(make_engine: Make) -> None:
    """Row 0 has a prompt of 5 tokens and answers of 4, and 7 fit: each loses one. Row 1 fits."""
    engine = make_engine("record", RECORD, likelihood=True, max_length=7)
    arrays = engine.rows.examples("test").arrays
    assert arrays["cut_prompt"].tolist() == [True, False]
    assert arrays["cut_answer"].tolist() == [True, False]
    assert np.diff(arrays["offsets"]).tolist() == [7, 7, 7, 5, 5]


def test_cut_pairs_are_counted_by_row(make_engine: Make) -> None:
    """Both pairs of row 0 have nine tokens, and those of row 1 seven."""
    engine = make_engine("copa", [COPA[0], COPA[1] | {"premise": "rain."}], max_length=8)
    arrays = engine.rows.examples("test").arrays
    assert arrays["cut_text"].tolist() == [True, False]
    assert np.diff(arrays["offsets"]).tolist() == [8, 8, 7, 7]


@pytest.mark.parametrize("labels", [[1.0, 0.0], [1, 0]])
def test_whole_numbers_of_a_column_with_a_gap(labels: list[Any], make_engine: Make) -> None:
    """A reader of CSV makes fractional numbers of whole ones beside a gap."""
    table = [row | {"label": label} for row, label in zip(COPA, labels, strict=True)]
    engine = make_engine("copa", table)
    assert engine.rows.examples("test").arrays["right"].tolist() == [False, True, True, False]


def test_a_fractional_number_is_no_candidate(make_engine: Make) -> None:
    with pytest.raises(ValueError, match="has a number in label, must be the number of a candida"):
        make_engine("copa", [row | {"label": 0.5} for row in COPA]).rows.examples("test")


# --- scores, losses, metrics --------------------------------------------------------------------

# Rows of two, three and two candidates; the second has two right ones.
SCORES = torch.tensor([[0.0], [2.0], [1.0], [3.0], [2.0], [1.0], [0.0]])
BATCH = {
    "row": torch.tensor([2, 0, 1]),
    "input_ids": torch.ones(7, 1, dtype=torch.long),
    "attention_mask": torch.ones(7, 1, dtype=torch.long),
    "choices": torch.tensor([2, 3, 2]),
    "right": torch.tensor([True, False, True, False, True, True, False]),
}
LOSSES = [
    np.log(1 + np.exp(2)),  # candidate 0 of scores 0 and 2
    -np.log((np.exp(1) + np.exp(2)) / (np.exp(1) + np.exp(3) + np.exp(2))),
    -np.log(np.exp(1) / (np.exp(1) + 1)),
]


def test_losses_by_hand() -> None:
    task, model = MultipleChoice(), Logits(SCORES)
    inf = float("-inf")
    assert task.scores(task.forward(model, BATCH), BATCH).tolist() == [
        [0, 2, inf],
        [1, 3, 2],
        [1, 0, inf],
    ]
    measures = task.evaluate_batch(task.forward(model, BATCH), BATCH)
    assert measures["loss"].tolist() == pytest.approx(LOSSES)
    assert measures["prediction"].tolist() == [1, 1, 0]
    assert measures["hit"].tolist() == [False, False, True]
    assert float(task.loss(task.forward(model, BATCH), BATCH)) == pytest.approx(np.mean(LOSSES))


def test_scores_by_hand(tmp_path: Path) -> None:
    """A batch's rows are numbers in the split, here 2, 0 and 1."""
    rows: Rows = [
        {"premise": "x", "c": ["the old house", "big house", "old big house"]}
        | {"a": ["the old house", "old big house"]},
        {"premise": "x", "c": ["team", "goal"], "a": ["team"]},
        {"premise": "x", "c": ["rain", "rain and snow"], "a": ["rain"]},
    ]
    task = MultipleChoice(
        path=write(tmp_path, train=rows, test=rows[:1]),
        validation_split="test",
        choices=["c"],
        answers="a",
        label=None,
        metrics=["accuracy", "token_f1", "exact_match"],
    )
    measures = task.evaluate_batch(task.forward(Logits(SCORES), BATCH), BATCH)
    metrics = task.score([measures | {"row": BATCH["row"]}], task.train_rows, None)
    assert set(metrics) == {"loss", "accuracy", "token_f1", "exact_match"}
    assert metrics["loss"] == pytest.approx(np.mean(LOSSES))
    assert metrics["accuracy"] == metrics["exact_match"] == pytest.approx(1 / 3)
    # row 2: "rain and snow" beside "rain"; 0: "big house" beside "old big house"; 1 is right
    assert metrics["token_f1"] == pytest.approx((1 / 2 + 4 / 5 + 1) / 3)


@pytest.mark.parametrize("likelihood", [True, False])
def test_scores_of_a_model(make_engine: Make, likelihood: bool) -> None:
    """A batch with padding has the scores of each candidate alone."""
    rows = RECORD if likelihood else COPA
    engine = make_engine("record" if likelihood else "copa", rows, likelihood=likelihood)
    model = engine.replica.model.eval()
    examples = engine.rows.examples("test")
    expected: list[list[float]] = []
    for row in range(2):
        alone = examples.batch(np.array([row]))
        scores = []
        for ids, mask in zip(alone["input_ids"], alone["attention_mask"], strict=True):
            candidate = ids[: int(mask.sum())][None]
            with torch.no_grad():
                logits = model(
                    input_ids=candidate, attention_mask=torch.ones_like(candidate)
                ).logits[0]
            if likelihood:
                prompt = int(alone["prompts"][0])
                logp = logits.log_softmax(-1)
                places = range(prompt, candidate.shape[1])
                scores.append(float(np.mean([float(logp[i - 1, ids[i]]) for i in places])))
            else:
                scores.append(float(logits[0]))
        expected.append(scores)
    batch = examples.batch(np.arange(2))
    with torch.no_grad():
        together = engine.task.scores(engine.task.forward(model, batch), batch).tolist()
    for row, scores in zip(together, expected, strict=True):
        assert row[: len(scores)] == pytest.approx(scores, abs=1e-5)
        assert set(row[len(scores) :]) <= {float("-inf")}


@pytest.mark.parametrize("likelihood", [True, False])
def test_a_run(run: Runner, decoder: Path, tmp_path: Path, likelihood: bool) -> None:
    path = write(tmp_path / "c", train=repeated(COPA, 30), validation=COPA)
    model = [f"model.path={decoder}", "data.scoring=likelihood"] if likelihood else []
    data = ["data=copa", f"data.path={path}"]
    summary = run(*model, *data, "method.rank=4", "local_steps=6", "lr=0.01")
    assert summary["refused"] == {} and summary["selected_by"] == "validation_accuracy"
    measured = {key for key in summary["final"] if key.startswith("test_")}
    assert measured == {"test_loss", "test_accuracy"}
    lines = run.lines()
    assert lines[2]["validation_loss"] < lines[0]["validation_loss"]
    assert summary["data"]["rows"] == {"train": 54, "validation": 6, "test": 2}
    none = {"cut_prompt": 0, "cut_answer": 0}
    cut = dict.fromkeys(("train", "validation", "test"), none) if likelihood else {}
    assert summary["data"]["cut"] == cut


# --- rows and fields ----------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "none right": ({"answers": ["frost"]}, "has a list in answers, must be texts of candidates"),
    "no answer": ({"answers": []}, "has a list in answers, must be texts of candidates"),
    "null answers": ({"answers": None}, "has no answers"),
    "one entity": ({"entities": ["rain", "rain"]}, "has 1 candidates, needs 2"),
    "no entity": ({"entities": []}, "has 0 candidates, needs 2"),
    "null entities": ({"entities": None}, "has no entities"),
    "empty passage": ({"passage": " "}, "has an empty passage"),
    "null query": ({"query": None}, "has no query"),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_have_no_choice(tmp_path: Path, case: str) -> None:
    changes, reason = BAD[case]
    path = write(tmp_path, train=[RECORD[1], RECORD[0] | changes, RECORD[0]], validation=RECORD)
    record = composed("data=record").data
    skipping: MultipleChoice = replace(record, path=path, validation_split="validation")
    assert values(skipping.train_rows, "idx") == [1, 0]
    assert skipping.fingerprint()["skipped"] == {reason: 1}
    strict = replace(skipping, bad_rows="error")
    with pytest.raises(ValueError) as error:
        _ = strict.train_rows
    assert str(error.value) == f"row 2 of train (line 2) {reason}: {NO_ROW}"


@pytest.mark.parametrize(("cell", "stored"), [("rain;team", "text"), ([1, 2], "a list")])
def test_candidates_that_are_no_list_of_texts(tmp_path: Path, cell: Any, stored: str) -> None:
    """A CSV file has one text, whose letters would be candidates."""
    rows = [row | {"entities": cell} for row in RECORD]
    task = replace(composed("data=record").data, path=write(tmp_path, train=rows), bad_rows="error")
    with pytest.raises(ValueError, match=f"has {stored} in entities, must be a list of texts"):
        task.split_rows("train")


def test_one_text_is_a_right_answer_and_no_part_of_it(tmp_path: Path) -> None:
    rows = [RECORD[1] | {"entities": ["goal", "goal and team"], "answers": "goal and team"}]
    path = write(tmp_path, train=rows, validation=rows)
    task: MultipleChoice = replace(
        composed("data=record").data, path=path, validation_split="validation"
    )
    assert task.right(task.train_rows) == [[1]]


@pytest.mark.parametrize("label", [2, -1, None])
def test_a_label_that_names_no_candidate(tmp_path: Path, label: int | None) -> None:
    path = write(tmp_path, train=[*COPA, COPA[0] | {"label": label}], validation=COPA)
    with pytest.raises(ValueError) as error:
        replace(composed("data=copa").data, path=path).split_rows("train")
    found = "nothing" if label is None else "a whole number"
    reason = f"has {found} in label, must be the number of a candidate"
    assert str(error.value) == f"row 3 of train (line 3) {reason}: {NO_ROW}"


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"scoring": "vote"}, "data.scoring must be head or likelihood, got vote"),
    ({"max_length": 3}, "data.max_length must be >= 4, got 3"),
    ({"label": None}, "data.label or data.answers must say which candidate is right"),
]


@pytest.mark.parametrize(("fields", "expected"), FIELDS)
def test_fields_are_checked(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as error:
        MultipleChoice(**fields)
    assert str(error.value) == expected
