"""Every YAML in conf/data, on small tables with the columns and layout of its hub data set."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from fedpeft.config.compose import CONF
from fedpeft.data.rows.tables import values
from fedpeft.data.rows.templates import rendered
from fedpeft.engine.engine import Engine
from tests.conftest import TOPICS, job_of
from tests.data.files import image
from tests.data.shortcuts import composed

NAMES = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
WORDS = sum((words.split() for words in TOPICS.values()), [])
TEXT = Value("string")
PAIR = ["sentence1", "sentence2"]
BINARY = ["not_entailment", "entailment"]
VIT = "{model_type: vit, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
VIT += "intermediate_size: 64, image_size: 8, patch_size: 4, num_channels: 3}"

# Class, validation_fraction, test_split (null: rows of train are set aside), metrics, classes.
EXPECTED: dict[str, tuple[str, float, str | None, list[str], list[str] | None]] = {
    "cola": (
        "TextClassification",
        0.1,
        "validation",
        ["matthews", "accuracy"],
        ["unacceptable", "acceptable"],
    ),
    "sst2": ("TextClassification", 0.01, "validation", ["accuracy"], ["negative", "positive"]),
    "mrpc": (
        "TextClassification",
        0.1,
        "validation",
        ["f1", "accuracy"],
        ["not_equivalent", "equivalent"],
    ),
    "qqp": (
        "TextClassification",
        0.01,
        "validation",
        ["f1", "accuracy"],
        ["not_duplicate", "duplicate"],
    ),
    "mnli": (
        "TextClassification",
        0.01,
        "validation_matched",
        ["accuracy"],
        ["entailment", "neutral", "contradiction"],
    ),
    "qnli": ("TextClassification", 0.01, "validation", ["accuracy"], BINARY[::-1]),
    "rte": ("TextClassification", 0.1, "validation", ["accuracy"], BINARY[::-1]),
    "stsb": ("Regression", 0.1, "validation", ["spearman", "pearson"], None),
    "copa": ("MultipleChoice", 0.1, "validation", ["accuracy"], None),
    "record": ("MultipleChoice", 0.01, "validation", ["token_f1", "exact_match"], None),
    "squad": ("QuestionAnswering", 0.01, "validation", ["token_f1", "exact_match"], None),
    "dolly": ("InstructionTuning", 0.1, None, ["rouge_l", "bleu4"], None),
    "medquad": ("InstructionTuning", 0.1, None, ["rouge_l", "bleu4"], None),
    "instructions": ("InstructionTuning", 0.1, None, ["rouge_l", "bleu4"], None),
    "brain_tumor": (
        "ImageClassification",
        0.1,
        "test",
        ["f1_macro", "f1_weighted", "accuracy"],
        ["glioma", "meningioma"],
    ),
    "images": (
        "ImageClassification",
        0.1,
        "test",
        ["f1_macro", "f1_weighted", "accuracy"],
        ["glioma", "meningioma"],
    ),
}
# Class of each YAML that names no data set of the hub.
NOT_OF_THE_HUB = {
    "docstrings": "Docstrings",
    "docstrings_lm": "DocstringsLM",
    "docstrings_qa": "DocstringsQA",
    "table": "TextClassification",
}


def test_every_yaml_is_here() -> None:
    assert sorted([*EXPECTED, *NOT_OF_THE_HUB]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_yaml_composes(name: str) -> None:
    data = composed(f"data={name}").data
    assert type(data).__name__ == (NOT_OF_THE_HUB.get(name) or EXPECTED[name][0])
    if name not in EXPECTED:
        return
    _, fraction, test, metrics, _ = EXPECTED[name]
    assert (data.validation_fraction, data.test_fraction, data.metrics) == (fraction, 0.1, metrics)
    if data.path is None:  # somebody's own rows, perhaps with splits
        assert (data.validation_split, data.test_split) == ("validation", "test")
    else:
        assert (data.validation_split, data.test_split) == (None, test) and "/" in data.path
    if data.path in ("nyu-mll/glue", "aps/super_glue"):
        assert data.subset == name and len(data.revision) == 40


# --- rows as the hub's --------------------------------------------------------------------------


def words(i: int, count: int) -> str:
    """Return so many words, which differ by row ``i``."""
    return " ".join(WORDS[(7 * i + j) % len(WORDS)] for j in range(count))


Tables = tuple[Features | None, Callable[[int], dict[str, Any]]]


def glue(names: list[str], *columns: str) -> Tables:
    """Return features and rows of a GLUE data set.

    Args:
        names: names of the classes, in the order of their numbers.
        columns: names of the columns of text.
    """
    features = {column: TEXT for column in columns}
    features |= {"label": ClassLabel(names=names), "idx": Value("int32")}
    return (
        Features(features),
        lambda i: (
            {column: words(i + k, 3 + i % 4) for k, column in enumerate(columns)}
            | {"label": i % len(names), "idx": i}
        ),
    )


def entities(i: int) -> dict[str, Any]:
    names = [words(i, 1), words(i + 1, 1), words(i, 1), words(i + 2, 2)]
    answers = [] if i == 4 else [names[i % 3], names[3]]  # one row has no right entity
    text = {"passage": f"{words(i, 6)}\n@highlight\n{words(i + 1, 4)}", "query": "the @placeholder"}
    spans = {"text": names, "start": [0] * 4, "end": [1] * 4}
    idx = {"idx": {"passage": i, "query": 0}}
    return text | {"entities": names, "entity_spans": spans, "answers": answers} | idx


def question(i: int) -> dict[str, Any]:
    answers = {"text": [words(i, 2), words(i, 1)], "answer_start": [0, 0]}
    return {
        "id": str(i),
        "title": f"t{i % 3}",
        "context": words(i, 9),
        "question": words(i, 3),
        "answers": answers,
    }


def dolly(i: int) -> dict[str, Any]:
    return {
        "instruction": words(i, 3),
        "context": words(i, 4) if i % 2 else "",
        "response": words(i, 5),
        "category": ["open_qa", "brainstorming"][i % 2],
    }


def medquad(i: int) -> dict[str, Any]:
    return {
        "document_id": str(i),
        "question": words(i, 3),
        "question_type": f"k{i % 3}",
        "answer": None if i % 5 == 4 else words(i, 4),  # the hub omits answers under copyright
        "question_focus": "x",
    }


def picture(i: int) -> dict[str, Any]:
    return {"image": {"bytes": image(i), "path": None}, "label": ["glioma", "meningioma"][i % 2]}


def choice(i: int) -> dict[str, Any]:
    return {
        "premise": words(i, 4) + ".",
        "choice1": words(i + 1, 2),
        "choice2": words(i + 2, 3),
        "question": ["cause", "effect"][i % 2],
        "idx": i,
        "label": i % 2,
    }


HUB: dict[str, Tables] = {
    "cola": glue(["unacceptable", "acceptable"], "sentence"),
    "sst2": glue(["negative", "positive"], "sentence"),
    "mrpc": glue(["not_equivalent", "equivalent"], *PAIR),
    "qqp": glue(["not_duplicate", "duplicate"], "question1", "question2"),
    "mnli": glue(["entailment", "neutral", "contradiction"], "premise", "hypothesis"),
    "qnli": glue(BINARY[::-1], "question", "sentence"),
    "rte": glue(BINARY[::-1], *PAIR),
    "stsb": (
        Features({c: TEXT for c in PAIR} | {"label": Value("float32"), "idx": Value("int32")}),
        lambda i: glue(["x"], *PAIR)[1](i) | {"label": (i * 1.7) % 5},
    ),
    "copa": (None, choice),
    "record": (None, entities),
    "squad": (
        Features(
            {c: TEXT for c in ("id", "title", "context", "question")}
            | {"answers": {"text": List(TEXT), "answer_start": List(Value("int32"))}}
        ),
        question,
    ),
    "dolly": (None, dolly),
    "medquad": (None, medquad),
    "instructions": (None, dolly),
    "brain_tumor": (None, picture),
    "images": (None, picture),
}
TRAIN, DEV, TEST = 25, 7, 4  # rows of each split


def hub(folder: Path, name: str) -> str:
    """Write files as ``hf download`` leaves them; GLUE's test rows have the label -1."""
    features, make = HUB[name]
    test = EXPECTED[name][2]
    splits = {"train": range(TRAIN)}
    if name == "mnli":
        splits |= {"validation_matched": range(30, 37), "validation_mismatched": range(40, 49)}
    elif test is not None:
        splits |= {test: range(30, 30 + DEV)}
    folder.mkdir()
    for split, numbers in splits.items():
        table = Dataset.from_list([make(i) for i in numbers], features)
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    if features is not None and test == "validation":
        hidden = [make(i) | ({} if name == "squad" else {"label": -1}) for i in range(TEST)]
        Dataset.from_list(hidden, features).to_parquet(str(folder / "test-00000-of-00001.parquet"))
    return str(folder)


# Rows that train, validate and test, by validation_fraction; numbers set aside are rounded up.
ROWS = {0.1: (22, 3, DEV), 0.01: (24, 1, DEV)}
OTHER_ROWS = {
    "record": (23, 1, DEV),  # of the 24 rows with a right entity
    "medquad": (16, 2, 2),  # of the 20 rows with an answer 2 test; of the other 18, 2 validate
    "dolly": (19, 3, 3),  # of 25 rows 3 test; of the other 22, 3 validate
    "instructions": (19, 3, 3),
}


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], Any]:
    """``read("cola")`` gives the data set's task on its small tables."""
    return lambda name: replace(composed(f"data={name}").data, path=hub(tmp_path / name, name))


@pytest.fixture
def opened(base: list[str], decoder: Path, read: Callable[[str], Any]) -> Callable[[str], Engine]:
    """``opened("cola")`` gives an engine on the data set's small tables and a tiny model."""

    def make(name: str) -> Engine:
        kind, *_ = EXPECTED[name]
        model = []
        if kind == "ImageClassification":
            model = ["model=vit_base", "model.path=null", "model.random=true"]
            model += [f"model.architecture={VIT}"]
        elif kind in ("InstructionTuning", "QuestionAnswering") or name == "record":
            model = [f"model.path={decoder}"]
        settings = ["method.rank=4", "num_clients=1", "partition=iid"]
        return Engine(replace(composed(*base, *model, *settings), data=read(name)))

    return make


# These differ from another data set in columns and classes alone.
SLOW = {"qqp", "rte", "instructions", "images"}
CASES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in EXPECTED]


@pytest.mark.parametrize("name", CASES)
def test_small_tables(opened: Callable[[str], Engine], name: str) -> None:
    """Splits have their sizes, labels their classes, and test rows their metrics."""
    engine = opened(name)
    task, (_, fraction, _, metrics, classes) = engine.task, EXPECTED[name]
    expected = OTHER_ROWS.get(name) or ROWS[fraction]
    rows = task.fingerprint()["rows"]
    assert (rows["train"], rows["validation"], rows["test"]) == expected
    assert getattr(task, "label_names", None) == classes
    measured = engine.evaluate(engine.rows.examples("test"), last=True)
    names = set(metrics)
    if EXPECTED[name][0] in ("InstructionTuning", "QuestionAnswering"):
        forms = ("teacher_forced", "generated")
        names = {"token_accuracy", *(f"{m}_{form}" for m in metrics for form in forms)}
        assert len(engine.samples) == expected[2]
    assert set(measured) == {"loss", *names}
    assert all(value == value for value in measured.values())  # no NaN
    trained = engine.train_client(job_of(engine, 0)).trained
    assert trained.num_examples > 0 and trained.loss > 0


def test_mnli_s_two_tests(read: Callable[[str], Any]) -> None:
    task = read("mnli")
    assert task.fingerprint()["rows"] == {
        "train": 24,
        "validation": 1,
        "test": 7,
        "mismatched": 9,
    }
    assert values(task.split_rows("test"), "idx") == list(range(30, 37))
    assert values(task.split_rows("mismatched"), "idx") == list(range(40, 49))


def test_bad_rows_are_left_out(read: Callable[[str], Any]) -> None:
    no_answer = "has a list in answers, must be texts of candidates"
    assert read("record").fingerprint()["skipped"] == {no_answer: 1}
    assert read("medquad").fingerprint()["skipped"] == {"has an empty answer": 5}


def test_groups_by_which_clients_differ(read: Callable[[str], Any]) -> None:
    groups = {name: read(name).grouped(None)[1] for name in ("dolly", "medquad", "squad")}
    assert groups == {
        "dolly": ["brainstorming", "open_qa"],
        "medquad": ["k0", "k1", "k2"],
        "squad": ["t0", "t1", "t2"],
    }


def test_dolly_s_prompt_has_the_context_where_there_is_one(read: Callable[[str], Any]) -> None:
    task = read("dolly")
    rows = task.as_given("train")
    first, second = dolly(0), dolly(1)
    assert rendered(task.prompt, rows)[:2] == [
        first["instruction"],
        f"{second['instruction']}\n\n{second['context']}",
    ]


def test_copa_s_prompt_goes_on_from_the_premise(read: Callable[[str], Any]) -> None:
    task = read("copa")
    prompts = rendered(task.prompt, task.as_given("train"))
    premise = choice(0)["premise"].removesuffix(".")
    assert prompts[0] == f"{premise} because " and prompts[1].endswith(" so ")
