"""Images: every layout, each image once whatever its format, and the processor's pixels."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil

from fedpeft.config.load import load_config
from fedpeft.data.rows.tables import values
from fedpeft.data.tasks import images
from fedpeft.data.tasks.images import ImageClassification
from tests.conftest import Runner
from tests.data.files import Rows, image
from tests.data.shortcuts import error_of
from tests.data.stand_ins import Refusing

NO_ROW = "mend it, or leave such rows out with data.bad_rows=skip"
RED, BLUE = (250, 10, 10), (10, 10, 250)
ARCHITECTURE = (
    "{model_type: vit, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, "
    "intermediate_size: 64, image_size: 16, patch_size: 8, num_channels: 3}"
)


def row(content: bytes | None, label: Any = 0, **columns: Any) -> dict[str, Any]:
    """Return a row with an image as the hub stores it: a struct of bytes and a path."""
    return {"image": {"bytes": content, "path": "x.png"}, "label": label} | columns


def parquet(folder: Path, **splits: Rows) -> str:
    """Write one Parquet file a split and return the folder."""
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        Dataset.from_list(rows).to_parquet(str(folder / f"{split}.parquet"))
    return str(folder)


def task_of(path: str, **fields: Any) -> ImageClassification:
    """Return a task of two classes that validates on the test rows."""
    defaults: dict[str, Any] = {"labels": ["a", "b"], "validation_split": "test"}
    return ImageClassification(path=path, **(defaults | fields))


def ids(task: ImageClassification, split: str) -> list[int]:
    """Return the ``id`` column of a split's rows."""
    return values(task.split_rows(split), "id")


def vit_processor(side: int = 16) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": side, "width": side})


# --- layouts ------------------------------------------------------------------------------------


@pytest.fixture
def layouts(tmp_path: Path) -> dict[str, str]:
    """Paths of the same images as files by class, as structs, as bytes and as paths."""
    rows = [(image(i), "cat" if i < 3 else "dog") for i in range(5)]
    structs = [{"label": label, "image": {"bytes": b, "path": "p"}} for b, label in rows]
    paths = []
    for i, (content, label) in enumerate(rows):
        for split in ("train", "test"):
            file = tmp_path / "folder" / split / label / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        paths.append({"label": label, "image": str(file)})
    (tmp_path / "paths").mkdir()
    for split in ("train", "test"):
        with (tmp_path / "paths" / f"{split}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["label", "image"])
            writer.writeheader()
            writer.writerows(paths)
    plain = [{"label": label, "image": content} for content, label in rows]
    return {
        "folder": str(tmp_path / "folder"),
        "structs": parquet(tmp_path / "structs", train=structs, test=structs),
        "bytes": parquet(tmp_path / "bytes", train=plain, test=plain),
        "paths": str(tmp_path / "paths"),
    }


# datasets leaves CSV files to the garbage collector, which then warns
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("layout", ["folder", "structs", "bytes", "paths"])
def test_layouts(layouts: dict[str, str], layout: str) -> None:
    task = ImageClassification(path=layouts[layout], duplicates="keep", validation_split="test")
    assert task.label_names == ["cat", "dog"] and task.num_labels == 2
    examples = task.encode("train", vit_processor(8))
    assert examples.labels.tolist() == [0, 0, 0, 1, 1] and examples.pad_id == 0
    pixels = examples.arrays["pixels"]
    assert pixels.dtype == np.uint8 and pixels.shape == (5, 3, 8, 8)
    for i in range(5):  # the images have the processor's size, so nothing is resized
        noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        assert (pixels[i] == noise.transpose(2, 0, 1)).all()
    groups, names = task.grouped(None)
    assert (groups.tolist(), names) == ([0, 0, 0, 1, 1], ["cat", "dog"])
    batch = examples.batch(np.array([3]))
    assert batch["pixels"].dtype == torch.uint8 and batch["labels"].tolist() == [1]


# --- duplicates ---------------------------------------------------------------------------------


def test_each_image_once(tmp_path: Path) -> None:
    """Image 0 is twice in train, 3 in train and test, 4 twice in test, in different formats."""
    train = [(0, "PNG"), (1, "PNG"), (0, "BMP"), (3, "BMP"), (2, "PNG")]
    test = [(4, "PNG"), (3, "PNG"), (4, "TIFF")]
    splits = {
        split: [row(image(n, kind=kind), n % 2, id=i) for i, (n, kind) in enumerate(pictures)]
        for split, pictures in (("train", train), ("test", test))
    }
    path = parquet(tmp_path, **splits)
    task = task_of(path)
    assert ids(task, "train") == [0, 1, 4] and ids(task, "test") == [0, 1]
    fingerprint = task.fingerprint()
    assert fingerprint["rows"] == {"train": 3, "validation": 2, "test": 2}
    assert fingerprint["skipped"] == {"is a repeat in train": 2, "is a repeat in test": 1}
    whole = task_of(path, duplicates="keep")
    assert [len(ids(whole, s)) for s in ("train", "test")] == [5, 3] and whole.skipped == {}
    untested = task_of(path, test_split="train")  # image 3 stays, because no other split tests
    assert ids(untested, "train") == [0, 1, 3, 4]


def test_a_validation_split_and_further_tests_have_no_image_of_a_test(tmp_path: Path) -> None:
    seeds = {"train": [0, 1, 2, 3, 4], "dev": [5, 1, 6, 2], "test": [1, 7], "more": [2, 7]}
    splits = {s: [row(image(n), n % 2, id=n) for n in numbers] for s, numbers in seeds.items()}
    path = parquet(tmp_path, **splits)
    task = task_of(path, validation_split="dev", extra_tests={"more": "more"})
    assert ids(task, "train") == [0, 3, 4] and ids(task, "validation") == [5, 6]
    assert ids(task, "test") == [1, 7] and ids(task, "more") == [2, 7]


def test_images_are_set_aside_after_repeats_went(tmp_path: Path) -> None:
    """Otherwise an image could be in train and in validation."""
    rows = [row(image(n), n % 2, id=n) for n in [*range(20), *range(20)]]
    task = task_of(
        parquet(tmp_path, train=rows, test=rows[:4]), validation_split=None, validation_fraction=0.5
    )
    train, validation = ids(task, "train"), ids(task, "validation")
    assert len(train) == len(validation) == 8
    assert sorted([*train, *validation]) == list(range(4, 20))


def test_images_of_one_colour_and_other_sizes_differ(tmp_path: Path) -> None:
    """Red images of 8 by 8 and of 4 by 16 pixels have equal bytes, but another shape."""
    narrow = io.BytesIO()
    Image.new("RGB", (4, 16), RED).save(narrow, "PNG")
    rows = [row(image(*RED)), row(narrow.getvalue(), 1), row(image(*BLUE)), row(image(*RED))]
    task = task_of(parquet(tmp_path, train=rows, test=[row(image(1))]))
    assert len(task.train_rows) == 3


# --- broken images ------------------------------------------------------------------------------

WHOLE = image(0)
BROKEN = {
    "cut": WHOLE[:-30],
    "cut early": WHOLE[:20],
    "a text": b"hello",
    "nothing": b"",
    "no file": None,
    "header": b"P6 8 x8 255\n",  # Pillow raises ValueError
    "bomb": b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_image(tmp_path: Path, case: str) -> None:
    rows = [row(image(1), 0), row(image(2), 1), row(BROKEN[case], 1), row(image(3), 0)]
    path = parquet(tmp_path, train=rows, test=[row(image(4))])
    with pytest.raises(ValueError) as error:
        _ = task_of(path).train_rows
    assert str(error.value) == f"row 3 of train (counted from 1) has a broken image: {NO_ROW}"
    skipping = task_of(path, bad_rows="skip")
    assert len(skipping.train_rows) == 3
    assert skipping.fingerprint()["skipped"] == {"has a broken image": 1}
    assert skipping.encode("train", vit_processor()).labels.tolist() == [0, 1, 0]


def test_a_broken_file_of_a_folder(layouts: dict[str, str]) -> None:
    (Path(layouts["folder"]) / "train" / "dog" / "3.png").write_bytes(WHOLE[:40])
    with pytest.raises(ValueError) as error:
        _ = ImageClassification(path=layouts["folder"], validation_split="test").train_rows
    assert str(error.value) == f"row 4 of train (counted from 1) has a broken image: {NO_ROW}"


def test_other_errors(tmp_path: Path) -> None:
    path = parquet(tmp_path, train=[row(image(1), 0), row(image(2), 5)], test=[row(image(3))])

    def error(**fields: Any) -> str:
        return error_of(lambda: task_of(path, **fields).train_rows)

    unknown = (
        "row 2 of train (counted from 1) "
        "has a whole number in label, must be one of the 2 labels of "
    )
    unknown += "data.labels"
    assert error() == f"{unknown}: {NO_ROW}"
    assert error(image="picture") == (
        f"data set {path} has no column picture in train, only image, label"
    )
    assert error(duplicates="some") == "data.duplicates must be drop or keep, got some"


# --- pixels -------------------------------------------------------------------------------------

STATISTICS: dict[str, Any] = {"image_mean": [0.1, 0.5, 0.4], "image_std": [0.2, 0.5, 0.25]}
PROCESSORS = {
    "vit": ViTImageProcessorPil(size={"height": 12, "width": 20}, **STATISTICS),
    "clip": CLIPImageProcessorPil(  # resizes the shorter side, then crops
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}
    ),
    "siglip": SiglipImageProcessorPil(size={"height": 24, "width": 24}),
    "not normalized": ViTImageProcessorPil(size={"height": 9, "width": 9}, do_normalize=False),
    "not rescaled": ViTImageProcessorPil(
        size={"height": 9, "width": 9}, do_rescale=False, **STATISTICS
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_the_processor_s(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "AT_ONCE", 2)  # so three images are encoded in two parts
    encoded = [image(1, side=16), image(2, side=40), image(3, side=16)]
    rows = [row(content, i % 2) for i, content in enumerate(encoded)]
    task = task_of(parquet(tmp_path, train=rows, test=[row(image(9))]))
    processor = PROCESSORS[name]
    batch = task.encode("train", processor).batch(np.array([2, 0, 1]))
    seen: list[torch.Tensor] = []

    class Model(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> Any:
            seen.append(pixel_values)
            self.logits = torch.zeros(3, 2)
            return self

    task.forward(Model(), batch)
    pictures = [Image.open(io.BytesIO(encoded[i])).convert("RGB") for i in (2, 0, 1)]
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    assert seen[0].shape == expected.shape and seen[0].dtype == expected.dtype == torch.float32
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)


def test_encoded_once_and_again_when_a_file_changes(layouts: dict[str, str]) -> None:
    fields: dict[str, Any] = {"validation_split": "test", "duplicates": "keep"}
    ImageClassification(path=layouts["structs"], **fields).encode("train", vit_processor())
    again = ImageClassification(path=layouts["bytes"], **fields)
    examples = again.encode("train", Refusing(vit_processor()))  # equal images in another layout
    assert isinstance(examples.arrays["pixels"], np.memmap)
    with pytest.raises(AssertionError, match="was asked again"):
        again.encode("train", Refusing(vit_processor(12)))
    path = layouts["folder"]
    first = ImageClassification(path=path, **fields).encode("train", vit_processor())
    (Path(path) / "train" / "cat" / "1.png").write_bytes(image(77))
    changed = ImageClassification(path=path, **fields).encode("train", vit_processor())
    same = (changed.arrays["pixels"] == first.arrays["pixels"]).all(axis=(1, 2, 3))
    assert same.tolist() == [True, False, True, True, True]


# --- a run --------------------------------------------------------------------------------------


def test_a_vision_transformer_learns_colours(run: Runner, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        row(image(*(np.array([RED, BLUE][i % 2]) + rng.integers(-9, 6, 3)).tolist()), i % 2)
        for i in range(60)
    ]
    rows = [*rows[:50], rows[0], row(WHOLE[:40], 1), *rows[50:]]
    path = parquet(tmp_path / "p", train=rows[:52], test=rows[52:])
    fields = ["data=images", f"data.path={path}", "data.labels=[red,blue]", "data.bad_rows=skip"]
    model = ["model=vit_base", "model.path=null", "model.random=true"]
    tiny = [f"model.architecture={ARCHITECTURE}", "method.rank=4", "lr=0.01", "local_steps=4"]
    summary = run(*model, *tiny, *fields, "partition=iid")
    assert summary["refused"] == {} and summary["weights"] == "RANDOM"
    assert summary["data"]["skipped"] == {"has a broken image": 1, "is a repeat in train": 1}
    assert summary["data"]["rows"] == {"train": 45, "validation": 5, "test": 10}
    assert summary["selected_by"] == "validation_f1_macro" and summary["data"]["cut"] == {}
    measured = {key for key in summary["final"] if key.startswith("test_")}
    assert measured == {f"test_{m}" for m in ("loss", "f1_macro", "f1_weighted", "accuracy")}
    losses = [line["validation_loss"] for line in run.lines()]
    assert losses[2] < losses[0] and summary["final"]["test_accuracy"] == 1
    typed = load_config([*model, tiny[0], *fields]).data
    assert isinstance(typed, ImageClassification) and typed.needs == "image_processor"
