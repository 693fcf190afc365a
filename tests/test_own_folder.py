"""A client with its own data folder holds all its rows; its classes are numbered as elsewhere."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from flwr.app import Context, Message

from fedpeft.client.app import app as client_app
from fedpeft.config.overrides import join
from fedpeft.engine.engine import open_engine
from fedpeft.reporting.clients import read_clients
from tests.conftest import TOPICS, Runner, sentences, state_of
from tests.grids import own_rows, rewritten

LABELS = f"data.labels=[{','.join(TOPICS)}]"


@pytest.fixture
def ward(tmp_path: Path) -> Path:
    """A hospital's folder with only training rows, of two of the four classes."""
    import random

    rng = random.Random(5)
    rows = [(t, label) for label in ("music", "weather") for t in sentences(label, 15, rng)]
    columns = {"text": [t for t, _ in rows], "label": [label for _, label in rows]}
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "train.parquet"))
    return tmp_path


def test_labels_must_be_given(base: list[str], ward: Path) -> None:
    with pytest.raises(ValueError, match=r"own data-path needs data\.labels="):
        open_engine(join(base), str(ward))


def test_all_rows_are_the_clients_and_classes_keep_their_numbers(
    base: list[str], ward: Path
) -> None:
    engine = open_engine(join([*base, LABELS]), str(ward))
    for client in (0, 2):
        splits = engine.rows.client_examples(client)
        assert [len(splits[split]) for split in ("train", "validation", "test")] == [24, 3, 3]
        used = {int(label) for examples in splits.values() for label in examples.labels}
        assert used == {list(TOPICS).index("music"), list(TOPICS).index("weather")}


def test_the_node_names_its_folder(base: list[str], ward: Path, run: Any) -> None:
    numbers: dict[int, int] = {}

    def answer(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            config = {**context.node_config, "data-path": str(ward)}
            context = Context(1, context.node_id, config, context.state, {})
        reply = client_app(message=message, context=context)
        if message.metadata.message_type == "train":
            number = reply.content.metric_records["metrics"]["num-examples"]
            assert isinstance(number, int)
            numbers[int(context.node_config["partition-id"])] = number
        return reply

    summary = run(LABELS, "evaluation.clients=always", answer=answer)
    assert summary["refused"] == {} and numbers[1] == 24 and numbers[0] != 24
    # The site's baseline would tell how many of its rows have its commonest label.
    rows = read_clients(run.run_dir, 2)
    assert [("test_baseline" in row, "test_accuracy" in row) for row in rows] == [
        (True, True),
        (False, True),
        (True, True),
    ]
    assert "client_test_accuracy" in summary["final"]
    assert list(summary["baseline"]) == ["test_baseline"]  # the server's; of two clients is none's


def test_whatever_a_client_says_of_its_rows_it_weighs_no_more_than_half(
    run: Runner, ward: Path
) -> None:
    """Neither in the aggregate nor in the clients' mean."""

    def boasting(message: Message, context: Context) -> Message:
        reply = client_app(message=message, context=context)
        if context.node_config["partition-id"] == 1:
            metrics = reply.content.metric_records["metrics"]
            for key in [key for key in metrics if key.endswith("num-examples")]:
                metrics[key] = 10**8
        return reply

    given = (LABELS, "num_rounds=1", "evaluation.clients=always")
    run(*given, answer=boasting, grid=own_rows(1, ward))
    line = run.lines()[1]

    def said(kind: str, round: int, key: str) -> list[Any]:
        sent = run.recorder.of(kind, round)
        return [e.up.content.metric_records["metrics"][key] for e in sent]

    rows, weights = said("train", 1, "num-examples"), line["weights"]
    assert rows[1] == 10**8 and weights["1"] == 0.5
    assert weights["0"] / weights["2"] == pytest.approx(rows[0] / rows[2])
    losses, tested = said("evaluate", 2, "test_loss"), said("evaluate", 2, "test-num-examples")
    others = (losses[0] * tested[0] + losses[2] * tested[2]) / (tested[0] + tested[2])
    assert line["client_test_loss"] == pytest.approx((losses[1] + others) / 2)


def test_steps_that_a_client_says_excuse_no_norm(run: Runner, ward: Path) -> None:
    """A million steps would make an update of a million times the size look like the others'."""

    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message=message, context=context)
        if context.node_config["partition-id"] != 1 or message.metadata.message_type != "train":
            return reply
        start, end = state_of(message), state_of(reply)
        far = {name: start[name] + 1e6 * (value - start[name]) for name, value in end.items()}
        return rewritten(reply, message, far, **{"num-examples": 8 * 10**6, "num-steps": 10**6})

    given = (LABELS, "num_rounds=1", "local_steps=null", "local_epochs=1")
    (refused,) = run(*given, answer=answer, grid=own_rows(1, ward))["refused"].values()
    assert list(refused) == ["1"] and "its update's norm a step is " in refused["1"]
