"""Generated text: the same in a batch as alone, measured when asked, and saved as samples."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpeft.data.batching import Batch
from fedpeft.data.tasks.instruction import IGNORED, InstructionTuning, QuestionAnswering
from fedpeft.engine.engine import Engine
from fedpeft.reporting.observer import SPREAD
from tests.conftest import TOPICS, Runner
from tests.data.files import Rows, write
from tests.data.shortcuts import composed
from tests.data.stand_ins import tokenizer_of_words

ROOM = 6
WORDS = sum((words.split() for words in TOPICS.values()), [])


def instructions(rows: int) -> Rows:
    """Draw prompts of 1 to 12 words and responses of two."""
    rng = np.random.default_rng(0)
    return [
        {
            "instruction": " ".join(rng.choice(WORDS, 1 + i % 12)),
            "response": " ".join(rng.choice(WORDS, 2)),
        }
        for i in range(rows)
    ]


@pytest.fixture(scope="module")
def settings(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides of a run on the tiny Llama; 24 rows train, 8 validate and 24 test."""
    rows = instructions(56)
    folder = tmp_path_factory.mktemp("d")
    path = write(folder, train=rows[:24], validation=rows[24:32], test=rows[32:])
    return [
        f"model.path={decoder}",
        "data=instructions",
        f"data.path={path}",
        "data.validation_split=validation",
        "data.test_split=test",
        "data.max_length=40",
        f"data.max_answer_length={ROOM}",
        "partition=iid",
        "method.rank=4",
    ]


@pytest.fixture
def make_engine(base: list[str], settings: list[str]) -> Callable[..., Engine]:
    """``make_engine("lr=1", max_length=16)`` gives an engine that always generates.

    Keywords are fields of the task.
    """

    def make(*overrides: str, **fields: Any) -> Engine:
        config = composed(*base, *settings, "data.generate=always", "lr=0.01", *overrides)
        return Engine(replace(config, data=replace(config.data, **fields)))

    return make


def greedy(model: nn.Module, ids: list[int], room: int, end: int) -> list[int]:
    """Generate the most likely tokens without padding or cache.

    Args:
        model: a causal language model.
        ids: the prompt's tokens.
        room: tokens to generate at most.
        end: the token that ends the text and is not returned.
    """
    tokens: list[int] = []
    while len(tokens) < room:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + tokens])).logits
        token = int(logits[0, -1].argmax())
        if token == end:
            break
        tokens.append(token)
    return tokens


def test_a_batch_generates_what_each_row_does_alone(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    model: Any = engine.replica.model.eval()
    rows, tokenizer = engine.rows.examples("test"), engine.replica.processor

    def generate(batch: Batch) -> Tensor:
        return engine.task.generate_batch(model, batch, tokenizer)["generated"]

    batch = rows.batch(np.arange(len(rows)))
    assert len(set(batch["prompts"].tolist())) > 8  # so most are padded
    model.generation_config.repetition_penalty = 9.0  # as some models' files say
    endless = generate(batch)
    assert endless.shape == (24, ROOM)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(endless[0, 3]))  # one that comes
    lengths = []
    for row, generated in enumerate(generate(batch)):
        prompt = batch["input_ids"][row, : int(batch["prompts"][row])].tolist()
        assert endless[row].tolist() == greedy(model, prompt, ROOM, -1)
        expected = greedy(model, prompt, ROOM, tokenizer.eos_token_id)
        assert generated[generated != IGNORED].tolist() == expected
        assert (generated[len(expected) :] == IGNORED).all()
        lengths.append(len(expected))
    assert lengths[0] <= 3 and max(lengths) == ROOM  # some stop early, some do not
    alone = generate(rows.batch(np.array([0])))
    assert alone.shape[1] == lengths[0] + 1  # nothing is computed after the end


def test_settings_of_generation(make_engine: Callable[..., Engine]) -> None:
    def generate(**fields: Any) -> list[list[int]]:
        engine = make_engine(**fields)
        model, tokenizer = engine.replica.model.eval(), engine.replica.processor
        batch = engine.rows.examples("test").batch(np.arange(24))
        return engine.task.generate_batch(model, batch, tokenizer)["generated"].tolist()

    plain = generate()
    assert {len(row) for row in plain} == {ROOM}
    assert generate(generation={"max_new_tokens": 2}) == [row[:2] for row in plain]
    assert generate(generation={"num_beams": 3}) != plain


def test_threads_change_nothing(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine("evaluation.batch_size=3")
    rows = engine.rows.examples("test")
    assert engine.samples == []
    one = engine.evaluate(rows)
    samples = engine.samples
    assert len(samples) == 24
    assert engine.evaluate(rows, workers=2) == one and engine.samples == samples
    assert {"rouge_l_generated", "rouge_l_teacher_forced"} <= set(one)


def batch_of(*texts: str, tokenizer: Any, rows: list[int]) -> dict[str, Tensor]:
    ids = [torch.tensor(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
    padded = nn.utils.rnn.pad_sequence(ids, True, IGNORED)
    return {"generated": padded.long(), "row": torch.tensor(rows)}


def test_scores_of_generated_text_by_hand(tmp_path: Path) -> None:
    """Batches come by length, not in the rows' order; the best of several references counts."""
    answers = [["the rain", "snow rain"], ["goal"], ["snow"], ["a goal", "team"]]
    rows: Rows = [
        {"context": f"c{i}", "question": "?", "answers": {"text": texts}}
        for i, texts in enumerate(answers)
    ]
    task = QuestionAnswering(path=write(tmp_path, train=rows), label=None)
    tokenizer = tokenizer_of_words("rain", "snow", "goal", "team", "the", "a")
    batches = [
        batch_of("goal", "rain", tokenizer=tokenizer, rows=[3, 0]),
        batch_of("goal goal team", "", tokenizer=tokenizer, rows=[1, 2]),
    ]
    metrics, samples = task.score_generated(batches, task.as_given("train"), tokenizer)
    # F1: 3 and 0 are right but for an article, 1 has precision 1/3 and recall 1, 2 is empty
    assert metrics["token_f1_generated"] == pytest.approx((1 + 1 / 2 + 0 + 1) / 4)
    assert metrics["exact_match_generated"] == pytest.approx(2 / 4)
    assert [(s["row"], s["generated"], s["reference"]) for s in samples] == [
        ("0", "rain", "the rain"),
        ("1", "goal goal team", "goal"),
        ("2", "", "snow"),
        ("3", "goal", "a goal"),
    ]
    assert samples[1]["prompt"] == "c1\n\n?"


def test_references_may_be_cut_to_the_tokens_that_are_generated(tmp_path: Path) -> None:
    """The answer has four tokens, and two may be generated: they are all that can be right."""
    rows: Rows = [{"instruction": "?", "response": "rain snow goal team"}]
    tokenizer = tokenizer_of_words("rain", "snow", "goal", "team")
    batches = [batch_of("rain snow", tokenizer=tokenizer, rows=[0])]

    def rouge(**fields: Any) -> float:
        path = write(tmp_path, train=rows)
        task = InstructionTuning(path=path, label=None, max_answer_length=2, max_length=9, **fields)
        metrics, (sample,) = task.score_generated(batches, task.as_given("train"), tokenizer)
        assert sample["reference"] == "rain snow goal team"
        return metrics["rouge_l_generated"]

    assert rouge() == pytest.approx(2 / 3)  # precision 1, recall 1/2
    assert rouge(cut_references=True) == 1
    assert rouge(cut_references=True, generation={"max_new_tokens": 3}) == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    ("when", "each_round", "at_the_end", "headline"),
    [
        ("last", False, True, "rouge_l_generated"),
        ("always", True, True, "rouge_l_generated"),
        ("never", False, False, "rouge_l_teacher_forced"),
    ],
)
def test_when_a_task_generates(
    when: str, each_round: bool, at_the_end: bool, headline: str
) -> None:
    task = InstructionTuning(generate=when)
    assert (task.generates(False), task.generates(True)) == (each_round, at_the_end)
    assert task.headline == headline


def forms(metrics: dict[str, Any], prefix: str) -> set[str]:
    """Return the forms in which the metrics have ROUGE-L."""
    start = f"{prefix}_rouge_l_"
    means = (key for key in metrics if not key.endswith(SPREAD))
    return {key.removeprefix(start) for key in means if key.startswith(start)}


BOTH, FORCED = {"generated", "teacher_forced"}, {"teacher_forced"}


@pytest.mark.parametrize(
    ("when", "each_round", "at_the_end"),
    [("last", FORCED, BOTH), ("always", BOTH, BOTH), ("never", FORCED, FORCED)],
)
def test_when_a_run_generates(
    run: Runner, settings: list[str], when: str, each_round: set[str], at_the_end: set[str]
) -> None:
    summary = run(*settings, f"data.generate={when}", "lr=0.01")
    lines = run.lines()
    assert [forms(line, "validation") for line in lines] == [each_round] * 3
    assert not any(key.startswith("test_") for line in lines for key in line)
    for state in ("final", "best"):
        assert forms(summary[state], "test") == at_the_end
        assert forms(summary[state], "validation") == each_round
    assert summary["selected_by"] == "validation_loss" and summary["refused"] == {}
    losses = [line["validation_loss"] for line in lines]
    assert summary["best"]["round"] == int(np.argmin(losses)) and losses[2] < losses[0]
    assert summary["baseline"] == {}
    assert (run.run_dir / "samples.jsonl").is_file() == (when != "never")


def test_samples_can_be_read(run: Runner, settings: list[str]) -> None:
    summary = run(*settings, "num_rounds=1", "data.extra_tests={more: validation}")
    assert summary["data"]["cut"].keys() == {"train", "validation", "test", "more"}
    assert forms(summary["final"], "test_more") == forms(summary["final"], "test") == BOTH
    lines = (run.run_dir / "samples.jsonl").read_text().split("\n")
    samples = [json.loads(line) for line in lines[:-1]]
    rows = instructions(56)[32:]  # the test rows, which are evaluated last
    assert lines[-1] == "" and [sample["row"] for sample in samples] == [str(i) for i in range(24)]
    assert [s["prompt"] for s in samples] == [row["instruction"] for row in rows]
    assert [s["reference"] for s in samples] == [row["response"] for row in rows]
    known = {*WORDS, "<unk>"}
    assert any(set(s["generated"].split()) & known for s in samples)


def test_a_comparison_answers_questions(
    fedpeft: Callable[..., str], base: list[str], settings: list[str]
) -> None:
    """The untuned model and each method, also one that has no model of all clients, answer."""
    rest = [o for o in (*base, *settings) if not o.startswith("method")]
    asks = "study.methods=['lora+method.rank=4','fedsa_lora+method.rank=4']"
    text = fedpeft("compare", *rest, asks, "study.questions=2", "lr=0.03", "run_dir=out")
    said = Path("out/questions.md").read_text()
    assert said in text + "\n"
    first, second = (part.splitlines() for part in said.split("\n\n**"))
    row = instructions(56)[32]
    assert first[0] == f"**{row['instruction']}**"
    assert first[2] == f"- reference: {row['response']}"
    names = [line.removeprefix("- ").partition(":")[0] for line in first[3:]]
    assert names == ["before training", "lora+method.rank=4", "fedsa_lora+method.rank=4"]
    assert [line.partition(":")[0] for line in second[3:]] == ["- " + name for name in names]
    (sample, *_) = (
        json.loads(line)
        for line in Path("out/lora+method.rank=4/samples.jsonl").read_text().splitlines()
    )
    assert first[4] == f"- lora+method.rank=4: {sample['generated']}"
    assert first[3].partition(": ")[2] != sample["generated"]


def test_questions_need_a_task_that_generates(fedpeft: Callable[..., str], base: list[str]) -> None:
    with pytest.raises(SystemExit):
        fedpeft("compare", "--methods", "lora", *base[:-1], "study.questions=1", "run_dir=out")
    assert not Path("out").exists()


def test_clients_generate_with_their_own_parameters(run: Runner, settings: list[str]) -> None:
    """They do so after the last round and for test rows only, because the loss selects."""
    summary = run(*settings, "method=fedsa_lora", "method.rank=4")
    splits = ("client_validation", "client_test")
    by_round = [[forms(line, split) for split in splits] for line in run.lines()]
    assert by_round == [[FORCED, FORCED], [FORCED, FORCED], [FORCED, BOTH]]
    assert summary["selected_by"] == "client_validation_loss" and summary["refused"] == {}
    assert forms(summary["final"], "client_test") == BOTH and not forms(summary["final"], "test")
    assert not (run.run_dir / "samples.jsonl").exists()  # samples of clients stay with them


def test_generation_leaves_room_in_max_length(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt beside a short answer may be longer, so it is cut before generation."""
    engine = make_engine(max_length=16)
    model, examples = engine.replica.model, engine.rows.examples("test")
    seen: list[list[int]] = []
    generate = model.generate
    assert callable(generate)

    def watch(**arguments: Any) -> Any:
        seen.append(arguments["input_ids"][arguments["attention_mask"].bool()].tolist())
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", watch)
    batches = [examples.batch(np.array([row])) for row in range(len(examples))]
    for batch in batches:
        engine.task.generate_batch(model, batch, engine.replica.processor)
    prompts = [b["input_ids"][0, : int(b["prompts"][0])].tolist() for b in batches]
    assert max(map(len, prompts)) > 16 - ROOM
    for prompt, used in zip(prompts, seen, strict=True):
        short = len(prompt) <= 16 - ROOM
        assert used == (prompt if short else prompt[:5] + prompt[-5:])
