"""Image classification on folders or tables of images, without repeated images."""

import hashlib
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from torch import Tensor, nn

from fedpeft.cache import cached
from fedpeft.data.batching import Batch
from fedpeft.data.rows.cache import content_sha256
from fedpeft.data.rows.tables import values
from fedpeft.data.tasks.classification import Classification

# Functions import datasets, because it takes seconds and cached rows do without it.
if TYPE_CHECKING:
    from datasets import Dataset

BROKEN = "-"  # in place of the hash of an image that cannot be decoded
AT_ONCE = 256  # images decoded at a time


@dataclass(frozen=True)
class ImageClassification(Classification):
    """Predicts one class for each image.

    Args:
        image: column of the image: a path, encoded bytes, or what ``datasets`` stores.
        duplicates: ``drop`` leaves out images with the same pixels as an earlier one of the split,
            and in train and validation also images that stand in a test split. ``keep`` keeps all.
    """

    image: str = "image"
    duplicates: str = "drop"
    metrics: list[str] = field(default_factory=lambda: ["f1_macro", "f1_weighted", "accuracy"])

    auto_class = "AutoModelForImageClassification"
    needs = "image_processor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.duplicates not in ("drop", "keep"):
            raise ValueError(f"data.duplicates must be drop or keep, got {self.duplicates}")

    def columns(self) -> list[str]:
        return [self.image]

    def as_stored(self, rows: "Dataset") -> "Dataset":
        """Return rows whose images are not decoded, as bytes or a path."""
        from datasets import Image

        if self.image not in rows.column_names:
            return rows
        return rows.cast_column(self.image, Image(decode=False))

    def _hashes(self, rows: "Dataset") -> list[str]:
        """Return the sha256 of each image's size and RGB pixels, or BROKEN."""
        arrays = cached(
            ["pixels", content_sha256(rows, [self.image])],
            lambda: {
                "hashes": np.array([_pixels_sha256(value) for value in values(rows, self.image)])
            },
        )
        return arrays["hashes"].tolist()

    def problems(self, rows: "Dataset") -> dict[int, str]:
        broken = {
            i: f"has a broken {self.image}"
            for i, value in enumerate(self._hashes(rows))
            if value == BROKEN
        }
        return super().problems(rows) | broken

    def _checked(self, split: str, rows: "Dataset") -> "Dataset":
        """Check rows, and leave out repeats unless ``duplicates`` keeps them."""
        rows = super()._checked(split, rows)
        if self.duplicates == "keep":
            return rows
        seen: set[str] = set()
        tests = {self.test_split, *self.extra_tests.values()} & self.tables.keys()
        if split not in tests:
            for test in sorted(tests):
                seen.update(self._hashes(self._table(test)))
        unique = []
        for i, value in enumerate(self._hashes(rows)):
            if value not in seen:
                unique.append(i)
            seen.add(value)
        if len(unique) < len(rows):
            self.skipped[f"is a repeat in {split}"] = len(rows) - len(unique)
        return rows.select(np.asarray(unique, np.int64))

    def arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        """Encode resized ``pixels`` uint8 (rows, 3, H, W), normalised by ``scale`` and ``shift``.

        Both are (rows, 3).
        """
        return self.question_arrays(rows, processor) | {"labels": self.class_numbers(rows)}

    def question_rows(self, entries: list[dict[str, Any]]) -> "Dataset":
        """See ``Task.question_rows``; an image is the path of its file."""
        from datasets import Dataset, Features, Image

        rows = [{self.image: {"path": str(e[self.image]), "bytes": None}} for e in entries]
        return Dataset.from_list(rows, Features({self.image: Image(decode=False)}))

    def question_arrays(self, rows: "Dataset", processor: Any) -> dict[str, np.ndarray]:
        images = values(rows, self.image)
        parts = [_resized(images[i : i + AT_ONCE], processor) for i in range(0, len(rows), AT_ONCE)]
        mean, std = np.asarray(processor.image_mean), np.asarray(processor.image_std)
        if not processor.do_normalize:
            mean, std = np.zeros_like(mean), np.ones_like(std)
        factor = processor.rescale_factor if processor.do_rescale else 1
        normalisation = {"scale": factor / std, "shift": -mean / std}
        return {"pixels": np.concatenate(parts)} | {
            name: np.tile(value.astype(np.float32), (len(rows), 1))
            for name, value in normalisation.items()
        }

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        scale, shift = (batch[name][:, :, None, None] for name in ("scale", "shift"))
        return model(pixel_values=batch["pixels"] * scale + shift).logits.float()


def _resized(values: list[dict[str, Any]], processor: Any) -> np.ndarray:
    """Return images as the processor resizes them, uint8 (images, 3, H, W)."""
    images = [_decoded(value) for value in values]
    resized = processor(images, do_rescale=False, do_normalize=False, return_tensors="np")
    return np.clip(np.rint(resized["pixel_values"]), 0, 255).astype(np.uint8)


def _decoded(value: dict[str, Any]) -> Any:
    """Return an image that ``datasets`` stores as a PIL image in RGB."""
    source = io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]
    with PIL.Image.open(source) as image:
        return image.convert("RGB")


def _pixels_sha256(value: dict[str, Any] | None) -> str:
    try:
        image = _decoded(value or {})
    except Exception:  # Pillow's readers may raise anything for broken files
        return BROKEN
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
