"""Generated text: the same in a batch as alone, measured when asked, and kept to be read."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedpeft.data.tasks.instruction import IGNORED, InstructionTuning, QuestionAnswering
from fedpeft.engine.engine import Engine
from tests.conftest import TOPICS, Runner
from tests.data.conftest import tokenizer_of_words
from tests.data.made import Rows, composed, write

ROOM = 6
WORDS = sum((words.split() for words in TOPICS.values()), [])


def instructions(rows: int) -> Rows:
    """Prompts of 1 to 12 words."""
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
    """Overrides of a run on the tiny Llama: 24 rows to train on, 8 to validate, 24 to test."""
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
def session(base: list[str], settings: list[str]) -> Callable[..., Engine]:
    def make(*given: str, **fields: Any) -> Engine:
        config = composed(*base, *settings, "data.generate=always", "lr=0.01", *given)
        return Engine(replace(config, data=replace(config.data, **fields)))

    return make


def greedy(model: nn.Module, ids: list[int], room: int, end: int) -> list[int]:
    """The most likely token, again and again, without padding or cache; the end is left out."""
    found: list[int] = []
    while len(found) < room:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + found])).logits
        token = int(logits[0, -1].argmax())
        if token == end:
            break
        found.append(token)
    return found


def test_a_batch_generates_what_each_row_does_alone(session: Callable[..., Engine]) -> None:
    own = session()
    own.replica.model.eval()
    rows, tokenizer = own.rows.examples("test"), own.replica.processor
    batch = rows.batch(np.arange(len(rows)))
    assert len(set(batch["prompts"].tolist())) > 8  # so most are padded
    config: Any = own.replica.model.generation_config
    config.repetition_penalty = 9.0  # as some models' files say
    whole = own.task.generate_batch(own.replica.model, batch, tokenizer)["generated"]
    assert whole.shape == (24, ROOM)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(whole[0, 3]))  # one that comes
    found = own.task.generate_batch(own.replica.model, batch, tokenizer)["generated"]
    lengths = []
    for row, generated in enumerate(found):
        prompt = batch["input_ids"][row, : int(batch["prompts"][row])].tolist()
        assert whole[row].tolist() == greedy(own.replica.model, prompt, ROOM, -1)
        expected = greedy(own.replica.model, prompt, ROOM, tokenizer.eos_token_id)
        assert generated[generated != IGNORED].tolist() == expected
        assert (generated[len(expected) :] == IGNORED).all()
        lengths.append(len(expected))
    assert lengths[0] <= 3 and max(lengths) == ROOM  # some stop early, some do not
    alone = own.task.generate_batch(own.replica.model, rows.batch(np.array([0])), tokenizer)[
        "generated"
    ]
    assert alone.shape[1] == lengths[0] + 1  # nothing is computed after the end


def test_settings_of_generation(session: Callable[..., Engine]) -> None:
    def of(**fields: Any) -> list[list[int]]:
        own = session(**fields)
        own.replica.model.eval()
        batch = own.rows.examples("test").batch(np.arange(24))
        return own.task.generate_batch(own.replica.model, batch, own.replica.processor)[
            "generated"
        ].tolist()

    plain = of()
    assert {len(row) for row in plain} == {ROOM}
    assert of(generation={"max_new_tokens": 2}) == [row[:2] for row in plain]
    assert of(generation={"num_beams": 3}) != plain


def test_threads_change_nothing(session: Callable[..., Engine]) -> None:
    own = session("evaluation.batch_size=3")
    rows = own.rows.examples("test")
    assert own.samples == []
    one = own.evaluate(rows)
    samples = own.samples
    assert len(samples) == 24
    assert own.evaluate(rows, workers=2) == one and own.samples == samples
    assert {"rouge_l_generated", "rouge_l_teacher_forced"} <= set(one)


def batch_of(*texts: str, tokenizer: Any, rows: list[int]) -> dict[str, Tensor]:
    ids = [torch.tensor(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
    padded = nn.utils.rnn.pad_sequence(ids, True, IGNORED)
    return {"generated": padded.long(), "row": torch.tensor(rows)}


def test_scores_of_generated_text_by_hand(tmp_path: Path) -> None:
    """Batches come by length, not in the rows' order; the best of several references counts."""
    answers = [["the rain", "snow rain"], ["goal"], ["snow"], ["a goal", "team"]]
    rows: Rows = [
        {"context": f"c{i}", "question": "?", "answers": {"text": given}}
        for i, given in enumerate(answers)
    ]
    task = QuestionAnswering(path=write(tmp_path, train=rows), label=None)
    tokenizer = tokenizer_of_words("rain", "snow", "goal", "team", "the", "a")
    batches = [
        batch_of("goal", "rain", tokenizer=tokenizer, rows=[3, 0]),
        batch_of("goal goal team", "", tokenizer=tokenizer, rows=[1, 2]),
    ]
    found, samples = task.score_generated(batches, task.as_given("train"), tokenizer)
    # F1: 3 and 0 are right but for an article, 1 has precision 1/3 and recall 1, 2 is empty
    assert found["token_f1_generated"] == pytest.approx((1 + 1 / 2 + 0 + 1) / 4)
    assert found["exact_match_generated"] == pytest.approx(2 / 4)
    assert [(s["row"], s["generated"], s["reference"]) for s in samples] == [
        ("0", "rain", "the rain"),
        ("1", "goal goal team", "goal"),
        ("2", "", "snow"),
        ("3", "goal", "a goal"),
    ]
    assert samples[1]["prompt"] == "c1\n\n?"


def test_when_a_task_generates() -> None:
    found = {
        when: (task.generates(False), task.generates(True), task.headline)
        for when in ("last", "always", "never")
        for task in [InstructionTuning(generate=when)]
    }
    assert found == {
        "last": (False, True, "rouge_l_generated"),
        "always": (True, True, "rouge_l_generated"),
        "never": (False, False, "rouge_l_teacher_forced"),
    }


def forms(measures: dict[str, Any], prefix: str) -> set[str]:
    """Forms of ROUGE-L among the measures."""
    start = f"{prefix}_rouge_l_"
    return {key.removeprefix(start) for key in measures if key.startswith(start)}


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
    given = instructions(56)[32:]  # of the test, not of the one more
    assert lines[-1] == "" and [sample["row"] for sample in samples] == [str(i) for i in range(24)]
    assert [s["prompt"] for s in samples] == [row["instruction"] for row in given]
    assert [s["reference"] for s in samples] == [row["response"] for row in given]
    known = {*WORDS, "<unk>"}
    assert any(set(s["generated"].split()) & known for s in samples)


def test_clients_generate_with_their_own_parameters(run: Runner, settings: list[str]) -> None:
    """After the last round; in the rounds before, their metrics are teacher-forced alone."""
    summary = run(*settings, "method=fedsa_lora", "method.rank=4")
    found = [[forms(line, f"client_{s}") for s in ("validation", "test")] for line in run.lines()]
    assert found == [[FORCED, FORCED], [FORCED, FORCED], [BOTH, BOTH]]
    assert summary["selected_by"] == "client_validation_loss" and summary["refused"] == {}
    assert forms(summary["final"], "client_test") == BOTH and not forms(summary["final"], "test")
    assert not (run.run_dir / "samples.jsonl").exists()  # they are each client's own


def test_generation_leaves_room_in_max_length(
    session: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt beside a short answer may be longer; what is generated must fit all the same."""
    made = session(max_length=16)
    task, examples = made.task, made.rows.examples("test")
    seen: list[Tensor] = []
    generate = made.replica.model.generate
    assert callable(generate)

    def watch(**given: Any) -> Any:
        seen.append(given["input_ids"][given["attention_mask"].bool()])
        return generate(**given)

    monkeypatch.setattr(made.replica.model, "generate", watch)
    rows = np.arange(len(examples))
    for row in rows:
        task.generate_batch(
            made.replica.model, examples.batch(rows[row : row + 1]), made.replica.processor
        )
    prompts = [examples.batch(rows[i : i + 1]) for i in rows]
    given = [b["input_ids"][0, : int(b["prompts"][0])].tolist() for b in prompts]
    assert max(map(len, given)) > 16 - ROOM
    for ids, used in zip(given, (s.tolist() for s in seen), strict=True):
        short = len(ids) <= 16 - ROOM
        assert used == (ids if short else ids[:5] + ids[-5:])
