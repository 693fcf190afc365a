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
from tests.conftest import TOPICS, sentences

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
