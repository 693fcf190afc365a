"""Answers to questions: the columns of a line, and what each task says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import ViTImageProcessorPil

from fedpeft.data.rows.tables import values
from fedpeft.data.tasks.base import Task
from fedpeft.data.tasks.choice import MultipleChoice
from fedpeft.data.tasks.images import ImageClassification
from fedpeft.data.tasks.instruction import InstructionTuning
from fedpeft.data.tasks.language import LanguageModelling
from fedpeft.data.tasks.text import Regression, TextClassification
from fedpeft.export.answers import answers, entry
from fedpeft.export.load import Opened
from tests.data.files import image
from tests.data.shortcuts import composed


def opened(base: list[str], task: Task, source: Path) -> Opened:
    """Return a task's own model with random weights."""
    config = replace(composed(*base, f"model.path={source}"), data=task)
    model = config.model.build(task.auto_class, task.num_labels, 0)
    return Opened(model.eval(), config, getattr(config.model, task.needs)())


def test_the_answers_are_in_the_lines_order(base: list[str], checkpoint: Path) -> None:
    task = TextClassification(labels=["a", "b", "c"])
    model = opened(base, task, checkpoint)
    lines = ["rain " * n for n in (3, 1, 2)]
    together = answers(model, lines)
    for line, answer in zip(lines, together, strict=True):
        (alone,) = answers(model, [line])
        assert answer["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-6)
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["label"] == max("abc", key=answer["probabilities"].__getitem__)
    assert together[0]["probabilities"] != pytest.approx(together[1]["probabilities"], abs=1e-4)


def test_a_number(base: list[str], checkpoint: Path) -> None:
    model = opened(base, Regression(text_pair="other"), checkpoint)
    (answer,) = answers(model, ['{"text": "rain", "other": "snow"}'])
    encoded = model.processor("rain", "snow", return_tensors="pt")
    expected = model.model(encoded["input_ids"], encoded["attention_mask"]).logits
    assert answer == {"value": pytest.approx(float(expected.detach()), abs=1e-5)}


def test_generated_text(base: list[str], decoder: Path) -> None:
    task = InstructionTuning(prompt="{{ q }}", max_length=16, max_answer_length=4)
    model = opened(base, task, decoder)
    first, second = answers(model, ["rain and snow", '{"q": "goal"}'])
    assert first["text"] and len(first["text"].split()) <= 4
    assert answers(model, ["goal"]) == [second]


def test_a_text_goes_on(base: list[str], decoder: Path) -> None:
    model = opened(base, LanguageModelling(max_length=8), decoder)
    (answer,) = answers(model, ["rain and snow"])
    ids = model.processor("rain and snow", return_tensors="pt")["input_ids"]
    following = model.model.generate(ids, do_sample=False, max_new_tokens=4)[0, ids.shape[1] :]  # type: ignore[operator]
    assert answer["text"] == model.processor.decode(following, skip_special_tokens=True).strip()


class Longest(nn.Module):
    """Scores a sequence by its number of tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return type("Output", (), {"logits": attention_mask.sum(-1, keepdim=True).float()})

    def parameters(self, recurse: bool = True) -> Any:
        return iter([nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize("several", ["answers", None])
def test_a_choice(base: list[str], checkpoint: Path, several: str | None) -> None:
    columns = ["entities"] if several else ["choice1", "choice2"]
    task = MultipleChoice(choices=columns, answers=several)
    model = opened(base, task, checkpoint)._replace(model=Longest())
    words = (
        '"entities": ["rain", "rain and snow"]'
        if several
        else ('"choice1": "rain", "choice2": "rain and snow"')
    )
    (answer,) = answers(model, ['{"premise": "wind", ' + words + "}"])
    assert answer["choice"] == "rain and snow"
    assert answer["probabilities"]["rain"] == pytest.approx(1 / (1 + np.e**2))


def test_an_image_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(image(3))
    task = ImageClassification(labels=["a", "b"])
    rows = task.question_rows([{"image": str(tmp_path / "x.png")}])
    assert values(rows, "image")[0]["path"] == str(tmp_path / "x.png")
    arrays = task.question_arrays(rows, ViTImageProcessorPil(size={"height": 8, "width": 8}))
    noise = np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)
    assert (arrays["pixels"][0] == noise.transpose(2, 0, 1)).all()
    assert "labels" not in arrays


def test_a_line_that_begins_like_json_may_be_a_text() -> None:
    task = TextClassification(labels=["a", "b"])
    assert entry(task, "{rain", 1) == {"text": "{rain"}
    with pytest.raises(ValueError, match="^line 4 must be a JSON object with text$"):
        entry(task, '{"note": "rain"}', 4)
    with pytest.raises(ValueError, match="^line 5 must be a JSON object with text, other$"):
        entry(TextClassification(labels=["a", "b"], text_pair="other"), "rain", 5)
