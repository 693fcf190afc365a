"""Instructions: prompts, the loss on answers alone, cuts, and teacher-forced metrics."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from fedpeft.data.batching import Examples
from fedpeft.data.rows.templates import (
    keep_ends,
    prompt_tokens,
    rendered,
    template_columns,
)
from fedpeft.data.tasks.instruction import InstructionTuning, QuestionAnswering
from fedpeft.data.tasks.language import sequences
from fedpeft.engine.engine import Engine
from tests.conftest import Runner
from tests.data.files import Rows, write
from tests.data.shortcuts import composed, error_of
from tests.data.stand_ins import Logits, tokenizer_of_words

OPTIONAL = "{{ instruction }}{% if context %} . {{ context }}{% endif %}"
NO_ROW = "mend it, or leave such rows out with data.bad_rows=skip"


# --- templates ----------------------------------------------------------------------------------


def test_an_optional_context() -> None:
    rows = Dataset.from_list(
        [{"instruction": f"i{i}", "context": c} for i, c in enumerate(["", "c1", None])]
    )
    assert template_columns(OPTIONAL) == ["context", "instruction"]
    assert rendered(OPTIONAL, rows) == ["i0", "i1 . c1", "i2"]


def test_templates_are_filled_row_by_row() -> None:
    rows = Dataset.from_list([{"a": None, "b": 1}, {"a": "x", "b": 2}])
    assert rendered("{{ a }}/{{ b }}\n", rows) == ["/1\n", "x/2\n"]  # a null is the empty text
    assert rendered("{{ choice }}{{ b }}", rows, choice=["p", "q"]) == ["p1", "q2"]
    assert rendered("the same", rows) == ["the same"] * 2
    assert rendered("", rows) == ["", ""]


def test_a_template_that_is_no_jinja() -> None:
    assert error_of(lambda: template_columns("{{ a")) == (
        "'{{ a' is no Jinja template: unexpected end of template, expected 'end of print "
        "statement'."
    )


# Templates may come from other people, so they get no access to Python's internals.
FAILING = {
    "{{ 1 // (a == 'x') }}": "2 (counted from 1) with ZeroDivisionError: "
    "integer division or modulo by zero",
    "{{ a.__class__.__mro__ }}": "1 (counted from 1) with SecurityError: access to "
    "attribute '__class__' of 'str' "
    "object is unsafe.",
}


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_in_a_row(template: str) -> None:
    rows = Dataset.from_list([{"a": "x"}, {"a": "y"}])
    error = error_of(lambda: rendered(template, rows))
    assert error == f"the template {template!r} fails in row {FAILING[template]}"


WORDS = "[INST] [/INST] goal rain".split()
BEGINNINGS = {
    # the tokenizer's post-processor, and the template
    "only the tokenizer": ("<s> $A", "[INST] {} [/INST]"),
    "only the template": ("$A", "<s> [INST] {} [/INST]"),
    "both": ("<s> $A", "<s> [INST] {} [/INST]"),
    "with an end": ("<s> $A </s>", "<s> [INST] {} [/INST]"),
}


@pytest.mark.parametrize("case", BEGINNINGS)
def test_a_prompt_has_one_beginning_and_no_end(case: str) -> None:
    single, template = BEGINNINGS[case]
    tokenizer = tokenizer_of_words(*WORDS, single=single)
    prompts = prompt_tokens([template.format(text) for text in ("goal", "rain goal")], tokenizer)
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in prompts] == [
        ["<s>", "[INST]", "goal", "[/INST]"],
        ["<s>", "[INST]", "rain", "goal", "[/INST]"],
    ]


def test_a_prompt_without_a_beginning() -> None:
    tokenizer = tokenizer_of_words(*WORDS, single="$A")
    assert prompt_tokens(["goal", "rain"], tokenizer) == [[6], [7]]


@pytest.fixture
def chat(base: list[str], decoder: Path, tmp_path: Path) -> Callable[..., Engine]:
    """``chat(rows)`` gives an engine with the tiny Llama; the rows train, validate and test."""

    def make(rows: Rows, template: str | None = None, **fields: Any) -> Engine:
        path = write(tmp_path / "chat", train=rows, validation=rows, test=rows)
        splits: dict[str, Any] = {"validation_split": "validation", "test_split": "test"}
        task = InstructionTuning(path=path, label=None, **splits, **fields)
        config = composed(*base, f"model.path={decoder}", "method.rank=4")
        model = replace(config.model, chat_template=template)
        return Engine(replace(config, data=task, model=model))

    return make


PAIR: Rows = [
    {"instruction": "rain then snow", "response": "a cloud", "context": "wind"},
    {"instruction": "goal", "response": "team", "context": None},
]


def words(engine: Engine, split: str = "test") -> list[tuple[list[str], list[str]]]:
    """Return the tokens of each row's prompt and answer."""
    examples = engine.rows.examples(split)
    pairs = []
    for row in range(len(examples)):
        batch = examples.batch(np.array([row]))
        tokens = engine.replica.processor.convert_ids_to_tokens(batch["input_ids"][0].tolist())
        start = int(batch["prompts"][0])
        pairs.append((tokens[:start], tokens[start:]))
    return pairs


def test_rows_through_the_plain_template(chat: Callable[..., Engine]) -> None:
    head, tail = ["<s>", "###", "Instruction:"], ["###", "Response:"]
    assert words(chat(PAIR, prompt=OPTIONAL)) == [
        ([*head, "rain", "then", "snow", ".", "wind", *tail], ["a", "cloud", "</s>"]),
        ([*head, "goal", *tail], ["team", "</s>"]),
    ]


def test_rows_through_a_configured_template(chat: Callable[..., Engine]) -> None:
    template = "{{ bos_token }}{% for m in messages %} {{ m.role }} , {{ m.content }}{% endfor %}"
    ending = " {% if add_generation_prompt %}because{% endif %}"
    pairs = words(chat(PAIR, template + ending))
    assert pairs[1] == (["<s>", "<unk>", ",", "goal", "because"], ["team", "</s>"])


# --- the loss -----------------------------------------------------------------------------------


def by_hand(model: nn.Module, rows: Examples, answers_only: bool) -> list[list[float]]:
    """Return -log p of each row's predicted tokens, from each row alone without padding.

    Args:
        model: a causal language model.
        rows: encoded prompts and answers.
        answers_only: leave out the prompts' tokens; else leave out each row's first token only.
    """
    losses = []
    for row in range(len(rows)):
        batch = rows.batch(np.array([row]))
        ids = batch["input_ids"][0]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        places = range(int(batch["prompts"][0]) if answers_only else 1, len(ids))
        losses.append([float(logits[i - 1].logsumexp(0) - logits[i - 1, ids[i]]) for i in places])
    return losses


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_the_loss_is_of_the_answers_tokens(chat: Callable[..., Engine], loss_on: str) -> None:
    engine = chat(PAIR, loss_on=loss_on)
    rows, task = engine.rows.examples("train"), engine.task
    model = engine.replica.model.eval()
    losses = by_hand(model, rows, loss_on == "answer")
    # answers with their ends; or all but the first: <s> ### Instruction: ... ### Response:
    expected = [3, 2] if loss_on == "answer" else [8 - 1 + 3, 6 - 1 + 2]
    assert [len(row) for row in losses] == expected
    batch = rows.batch(np.arange(2))
    with torch.no_grad():
        loss = float(task.loss(task.forward(model, batch), batch))
    assert loss == pytest.approx(np.mean(sum(losses, [])))
    metrics = engine.evaluate(rows)  # always of the answers
    answer_losses = by_hand(model, rows, True)
    assert metrics["loss"] == pytest.approx(np.mean(sum(answer_losses, [])))
    assert task.selects == ("loss", -1)


# --- cuts ---------------------------------------------------------------------------------------


def test_keep_ends() -> None:
    cut = [keep_ends(list(range(6)), room) for room in (7, 6, 5, 4, 1, 0)]
    whole = [0, 1, 2, 3, 4, 5]
    assert cut == [whole, whole, [0, 1, 3, 4, 5], [0, 1, 4, 5], [5], []]


def test_a_cut_always_leaves_an_answer() -> None:
    """3,000 prompts and answers of random lengths are cut to random limits."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        max_length = int(rng.integers(4, 40))
        room = int(rng.integers(1, max_length))
        sizes = rng.integers([0, 1], [60, 60], size=(10, 2))
        prompts = [list(range(1000, 1000 + p)) for p, _ in sizes]
        answers = [list(range(2000, 2000 + a)) for _, a in sizes]
        arrays = sequences(prompts, answers, max_length, room)
        assert arrays["offsets"][-1] == len(arrays["tokens"])
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids = arrays["tokens"][arrays["offsets"][i] : arrays["offsets"][i + 1]].tolist()
            start, end = ids[: arrays["prompts"][i]], ids[arrays["prompts"][i] :]
            assert len(end) >= min(len(answer), room) >= 1 and end == answer[: len(end)]
            assert len(ids) == min(max_length, len(prompt) + len(answer))
            head = len(start) // 2
            if len(start) < len(prompt):
                assert start == prompt[:head] + prompt[len(prompt) - (len(start) - head) :]
                assert len(end) <= room
            else:
                assert start == prompt
            assert bool(arrays["cut_prompt"][i]) == (len(start) < len(prompt))
            assert bool(arrays["cut_answer"][i]) == (len(end) < len(answer))


LONG: Rows = [
    {"instruction": "rain", "response": "a cloud"},  # 6 + 3 tokens
    {"instruction": "rain wind storm frost snow", "response": "a cloud"},  # 10 + 3
    {"instruction": "rain", "response": "rain wind storm frost snow thunder"},  # 6 + 7
    {"instruction": "rain wind storm frost snow", "response": "rain wind storm frost snow"},
]


def test_cuts_are_counted_in_the_summary(run: Runner, decoder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "long", train=LONG * 4, validation=LONG[:2], test=LONG[1:])
    fields = ["data.validation_split=validation", "data.test_split=test", "data.generate=never"]
    data = ["data=instructions", f"data.path={path}", *fields, "data.max_length=10"]
    sizes = ["data.max_answer_length=4", "partition=iid", "num_rounds=1"]
    summary = run(f"model.path={decoder}", *data, *sizes)
    assert summary["data"]["cut"] == {
        "train": {"cut_prompt": 8, "cut_answer": 8},
        "validation": {"cut_prompt": 1, "cut_answer": 0},
        "test": {"cut_prompt": 2, "cut_answer": 2},
    }
    assert summary["data"]["rows"] == {"train": 16, "validation": 2, "test": 3}
    assert json.loads((run.run_dir / "summary.json").read_text())["data"] == summary["data"]


# --- teacher-forced metrics ---------------------------------------------------------------------


def test_teacher_forced_metrics_by_hand() -> None:
    """The prompts have one token; the answers are (goal rain </s>) and (rain </s>)."""
    task = InstructionTuning(metrics=["rouge_l"], label=None)
    tokenizer = tokenizer_of_words(*WORDS)
    goal, rain, end = 6, 7, 2
    # predicted after each token: some are right, some are not
    predicted = torch.tensor([[goal, goal, end, goal], [rain, rain, goal, goal]])
    model = Logits(nn.functional.one_hot(predicted, 8).float() * 9)
    ids = torch.tensor([[1, goal, rain, end], [1, rain, end, 0]])
    prompts = torch.tensor([1, 1])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "prompts": prompts}
    measures = task.evaluate_batch(task.forward(model, batch), batch)
    assert measures["count"].tolist() == [3, 2] and measures["correct"].tolist() == [2, 1]
    measures["row"] = torch.tensor([0, 1])
    metrics = task.score([measures], Dataset.from_dict({}), tokenizer)
    assert set(metrics) == {"loss", "token_accuracy", "rouge_l_teacher_forced"}
    assert metrics["token_accuracy"] == pytest.approx(3 / 5)
    # "goal goal" for "goal rain": 1/2; "rain rain", without its end, for "rain": 2/3
    assert metrics["rouge_l_teacher_forced"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    right, wrong = np.log(np.exp(9) + 7) - 9, np.log(np.exp(9) + 7)
    assert metrics["loss"] == pytest.approx((3 * right + 2 * wrong) / 5, rel=1e-5)


# --- rows and fields ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"q": "x", "a": " "}, "an empty a"),
        ({"q": "x", "a": None}, "an empty a"),
        ({"q": "\n", "a": "y"}, "an empty prompt {{ q }}"),
        ({"q": None, "a": "y"}, "an empty prompt {{ q }}"),
    ],
)
def test_rows_without_a_prompt_or_an_answer(tmp_path: Path, row: Any, reason: str) -> None:
    fields: dict[str, Any] = {"prompt": "{{ q }}", "answer": "a", "label": None}
    fields |= {"path": write(tmp_path, train=[{"q": "x", "a": "y"}, row]), "test_split": "train"}
    task = InstructionTuning(**fields, validation_split="train")
    assert error_of(lambda: task.train_rows) == (f"row 2 of train (line 2) has {reason}: {NO_ROW}")
    skipping = InstructionTuning(**fields, validation_split="train", bad_rows="skip")
    assert len(skipping.train_rows) == 1 and skipping.skipped == {f"has {reason}": 1}


def test_references_of_instructions() -> None:
    rows = Dataset.from_dict({"response": [5, None, 7]})
    assert InstructionTuning().references(rows) == [["5"], [""], ["7"]]


ANSWERS = {
    "list": (["x", "y"], ["x", "y"]),
    "struct": ({"text": ["x", "y"], "answer_start": [0, 1]}, ["x", "y"]),
    "text": ("x", ["x"]),
    "number": (1969, ["1969"]),
    "list of numbers": ([1969, 2001], ["1969", "2001"]),
    "struct of numbers": ({"text": [1.5]}, ["1.5"]),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_references_of_questions(case: str) -> None:
    answers, expected = ANSWERS[case]
    rows = Dataset.from_dict({"answers": [answers]})
    assert QuestionAnswering().references(rows) == [expected]


def test_questions_without_an_answer(tmp_path: Path) -> None:
    answers = [{"text": texts} for texts in (["y"], [], [""])]
    rows = [{"context": "c", "question": "q", "answers": answer} for answer in answers]
    task = QuestionAnswering(path=write(tmp_path, train=rows), label=None)
    error = error_of(lambda: task.split_rows("train"))
    assert error == (f"row 2 of train (line 2) has an empty answers (and 1 rows more): {NO_ROW}")


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"max_length": 3}, "data.max_length must be >= 4, got 3"),
    (
        {"max_length": 8, "max_answer_length": 8},
        "data.max_answer_length must be from 1 to data.max_length - 1 = 7, got 8",
    ),
    ({"loss_on": "prompt"}, "data.loss_on must be answer or all, got prompt"),
    ({"generate": "first"}, "data.generate must be last, always or never, got first"),
    ({"generation": {"beams": 2}}, "data.generation.beams is no argument of generate"),
    (
        {"generation": {"max_length": 90}},
        "data.generation.max_length counts the prompt too, got 90: "
        "set data.generation.max_new_tokens",
    ),
    (
        {"generation": {"num_return_sequences": 2}},
        "data.generation.num_return_sequences must be 1, because one answer a question is scored, "
        "got 2",
    ),
]


@pytest.mark.parametrize(("fields", "expected"), FIELDS)
def test_fields_are_checked(fields: dict[str, Any], expected: str) -> None:
    assert error_of(lambda: InstructionTuning(**fields)) == expected
