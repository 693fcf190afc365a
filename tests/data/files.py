"""Small data sets on disk: tables in any format, and encoded images."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

Rows = list[dict[str, Any]]


def write(folder: Path, kind: str = "jsonl", suffix: str = "", **splits: Rows) -> str:
    """Write one file a split, named after the split, and return the folder.

    Args:
        folder: is created if it is missing.
        kind: jsonl, csv or parquet.
        suffix: follows the split in the file's name, as the hub's ``-00000-of-00001`` does.
        splits: rows by split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        write_file(folder / f"{split}{suffix}.{kind}", rows)
    return str(folder)


def write_file(file: Path, rows: Rows) -> str:
    """Write one table in the format that the file's name says, and return the file."""
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


def image(*numbers: int, side: int = 8, kind: str = "PNG") -> bytes:
    """Encode a square image of one colour or of noise.

    Args:
        numbers: red, green and blue of the colour, or one seed of the noise.
        side: pixels.
        kind: a format of Pillow's.
    """
    if len(numbers) == 1:
        pixels = np.random.default_rng(numbers[0]).integers(0, 256, (side, side, 3), np.uint8)
    else:
        pixels = np.full((side, side, 3), numbers, np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()
