"""Every YAML in conf/data, on small tables in its hub data set's columns and layout."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from fedpeft.config.load import CONF
from fedpeft.data.rows.tables import values
from fedpeft.data.rows.templates import rendered
from fedpeft.engine.engine import Engine
from tests.conftest import TOPICS, job_of
from tests.data.made import composed, image

NAMES = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
WORDS = sum((words.split() for words in TOPICS.values()), [])
TEXT = Value("string")
PAIR = ["sentence1", "sentence2"]
BINARY = ["not_entailment", "entailment"]
VIT = "{model_type: vit, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
VIT += "intermediate_size: 64, image_size: 8, patch_size: 4, num_channels: 3}"

# Class, share of train that validates, the dev set or null for rows of train, metrics, classes.
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
OWN = {"docstrings": "Docstrings", "docstrings_lm": "DocstringsLM", "table": "TextClassification"}


def test_every_yaml_is_here() -> None:
    assert sorted([*EXPECTED, *OWN]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_yaml_composes(name: str) -> None:
    data = composed(f"data={name}").data
    assert type(data).__name__ == (OWN.get(name) or EXPECTED[name][0])
    if name not in EXPECTED:
        return
    _, fraction, test, metrics, _ = EXPECTED[name]
    assert (data.validation_fraction, data.test_split, data.metrics) == (fraction, test, metrics)
    assert data.validation_split is None and data.test_fraction == 0.1
    assert data.path is None or "/" in data.path
    if data.path in ("nyu-mll/glue", "aps/super_glue"):
        assert data.subset == name and len(data.revision) == 40


# --- on tables as the hub's ---------------------------------------------------------------------


def words(i: int, count: int) -> str:
    return " ".join(WORDS[(7 * i + j) % len(WORDS)] for j in range(count))


def glue(names: list[str], *columns: str) -> tuple[Features, Callable[[int], dict[str, Any]]]:
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
    given = [words(i, 1), words(i + 1, 1), words(i, 1), words(i + 2, 2)]
    right = [] if i == 4 else [given[i % 3], given[3]]  # one row names none of them
    text = {"passage": f"{words(i, 6)}\n@highlight\n{words(i + 1, 4)}", "query": "the @placeholder"}
    spans = {"text": given, "start": [0] * 4, "end": [1] * 4}
    idx = {"idx": {"passage": i, "query": 0}}
    return text | {"entities": given, "entity_spans": spans, "answers": right} | idx


def question(i: int) -> dict[str, Any]:
    answers = {"text": [words(i, 2), words(i, 1)], "answer_start": [0, 0]}
    given = {"id": str(i), "title": f"t{i % 3}", "context": words(i, 9), "question": words(i, 3)}
    return given | {"answers": answers}


def dolly(i: int) -> dict[str, Any]:
    given = {"instruction": words(i, 3), "context": words(i, 4) if i % 2 else ""}
    return given | {"response": words(i, 5), "category": ["open_qa", "brainstorming"][i % 2]}


def medquad(i: int) -> dict[str, Any]:
    answer = None if i % 5 == 4 else words(i, 4)  # as the hub's, whose copyright forbids them
    given = {"document_id": str(i), "question": words(i, 3), "question_type": f"k{i % 3}"}
    return given | {"answer": answer, "question_focus": "x"}


def picture(i: int) -> dict[str, Any]:
    return {"image": {"bytes": image(i), "path": None}, "label": ["glioma", "meningioma"][i % 2]}


def choice(i: int) -> dict[str, Any]:
    given = {"premise": words(i, 4) + ".", "choice1": words(i + 1, 2), "choice2": words(i + 2, 3)}
    return given | {"question": ["cause", "effect"][i % 2], "idx": i, "label": i % 2}


Tables = tuple[Features | None, Callable[[int], dict[str, Any]]]
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
DEV, TEST = 7, 4  # rows, beside 25 to train on


def hub(folder: Path, name: str) -> str:
    """Files as ``hf download`` leaves them; a test's labels are hidden where GLUE hides them."""
    features, make = HUB[name]
    test = EXPECTED[name][2]
    splits = {"train": range(25)}
    if name == "mnli":
        splits |= {"validation_matched": range(30, 37), "validation_mismatched": range(40, 49)}
    elif test is not None:
        splits |= {test: range(30, 30 + DEV)}
    folder.mkdir()
    for split, numbers in splits.items():
        rows = [make(i) for i in numbers]
        table = Dataset.from_list(rows, features)
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    if features is not None and test == "validation":
        hidden = [make(i) | ({} if name == "squad" else {"label": -1}) for i in range(TEST)]
        Dataset.from_list(hidden, features).to_parquet(str(folder / "test-00000-of-00001.parquet"))
    return str(folder)


# train, validation and test rows; what is set aside is rounded up
ROWS = {0.1: (22, 3, DEV), 0.01: (24, 1, DEV)}
OTHER_ROWS = {
    "record": (23, 1, DEV),  # of 24 that name an entity
    "medquad": (16, 2, 2),  # of 20 with an answer: 2 to test, 2 of 18 to validate
    "dolly": (19, 3, 3),  # 3 of 25, 3 of 22
    "instructions": (19, 3, 3),
}


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], Any]:
    """A data set's small tables, without a model."""
    return lambda name: replace(composed(f"data={name}").data, path=hub(tmp_path / name, name))


@pytest.fixture
def opened(base: list[str], decoder: Path, read: Callable[[str], Any]) -> Callable[[str], Engine]:
    """A session of a data set's small tables, with a tiny model of its kind."""

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


# The slow ones differ from another in columns and classes alone.
SLOW = {"qqp", "rte", "instructions", "images"}
CASES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in EXPECTED]


@pytest.mark.parametrize("name", CASES)
def test_small_tables(opened: Callable[[str], Engine], name: str) -> None:
    """Sizes of the splits, classes, groups, and which measures the test rows get."""
    session = opened(name)
    task, (_, fraction, _, metrics, classes) = session.task, EXPECTED[name]
    expected = OTHER_ROWS.get(name) or ROWS[fraction]
    rows = task.fingerprint()["rows"]
    assert (rows["train"], rows["validation"], rows["test"]) == expected
    assert getattr(task, "label_names", None) == classes
    found = session.evaluate(session.rows.examples("test"), last=True)
    named = set(metrics)
    if EXPECTED[name][0] in ("InstructionTuning", "QuestionAnswering"):
        forms = ("teacher_forced", "generated")
        named = {"token_accuracy", *(f"{m}_{form}" for m in metrics for form in forms)}
        assert len(session.samples) == expected[2]
    assert set(found) == {"loss", *named}
    assert all(value == value for value in found.values())  # no NaN
    trained = session.train_client(job_of(session, 0), 1).trained
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


def test_what_is_left_out(read: Callable[[str], Any]) -> None:
    assert read("record").fingerprint()["skipped"] == {"has answers []: no candidate's": 1}
    assert read("medquad").fingerprint()["skipped"] == {"has an empty answer": 5}


def test_groups_by_which_clients_differ(read: Callable[[str], Any]) -> None:
    found = {name: read(name).grouped(None)[1] for name in ("dolly", "medquad", "squad")}
    assert found == {
        "dolly": ["brainstorming", "open_qa"],
        "medquad": ["k0", "k1", "k2"],
        "squad": ["t0", "t1", "t2"],
    }


def test_prompts(read: Callable[[str], Any]) -> None:
    """Dolly's context where there is one; COPA's sentence goes on."""
    task = read("dolly")
    rows = task.as_given("train")
    first, second = dolly(0), dolly(1)
    assert rendered(task.prompt, rows)[:2] == [
        first["instruction"],
        f"{second['instruction']}\n\n{second['context']}",
    ]
    task = read("copa")
    rows = task.as_given("train")
    premise = choice(0)["premise"].removesuffix(".")
    assert rendered(task.prompt, rows)[0] == f"{premise} because "
    assert rendered(task.prompt, rows)[1].endswith(" so ")
