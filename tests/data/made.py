"""Small tables in any format, images of one colour, and what stands in for models."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn

from fedpeft.config.load import load_config
from fedpeft.config.schema import Config

Rows = list[dict[str, Any]]


@cache
def composed(*overrides: str) -> Config:
    """A configuration, composed once; its ``data`` is to be replaced, since it keeps its rows."""
    return load_config(overrides)


def write(folder: Path, kind: str = "jsonl", suffix: str = "", **splits: Rows) -> str:
    """A folder with a file a split, named after it.

    Args:
        kind: jsonl, csv or parquet.
        suffix: of the names, such as hubs' ``-00000-of-00001``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        write_file(folder / f"{split}{suffix}.{kind}", rows)
    return str(folder)


def write_file(file: Path, rows: Rows) -> str:
    """One table."""
    if file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(file))
    elif file.suffix == ".csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def said(act: Callable[[], Any]) -> str:
    """The sentence of the ValueError that it raises."""
    with pytest.raises(ValueError) as error:
        act()
    return str(error.value)


def image(*pixels: int, side: int = 8, kind: str = "PNG") -> bytes:
    """An encoded image: one colour or, of one number, noise of that seed."""
    if len(pixels) == 1:
        given = np.random.default_rng(pixels[0]).integers(0, 256, (side, side, 3), np.uint8)
    else:
        given = np.full((side, side, 3), pixels, np.uint8)
    stream = io.BytesIO()
    Image.fromarray(given).save(stream, kind)
    return stream.getvalue()


class Logits(nn.Module):
    """Answers with given logits, whatever it is asked."""

    def __init__(self, logits: Tensor | Sequence[Any]) -> None:
        super().__init__()
        self.logits = torch.as_tensor(logits)

    def forward(self, **_: Tensor) -> "Logits":
        return self


class Refusing:
    """A tokenizer or image processor that must not be asked; the same to the cache as another."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def __getattr__(self, name: str) -> Any:
        return getattr(self.given, name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("was asked again")
