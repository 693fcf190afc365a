"""The file ``fedpeft.json`` of an exported folder: how it loads, and which task its model does."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedpeft.config.compose import changed, composed
from fedpeft.files import read_json

NAME = "fedpeft.json"
WEIGHTS = "fedpeft.safetensors"  # weights of a folder of fedpeft's own form
KEYS = ("seed", "layers", "precision", "method", "model", "data")  # keys of the configuration
FORMS = ("peft", "transformers", "fedpeft")


def write(folder: Path, form: str, tree: DictConfig, **more: Any) -> None:
    """Write the file.

    Args:
        folder: the exported folder.
        form: one of ``FORMS``.
        tree: the run's composed configuration. Places of rows are left out, because whoever gets
            the model does not have them.
        more: further entries, among them the ``labels``; null if the task has none.
    """
    kept: dict[str, Any] = {key: _plain(tree[key]) for key in KEYS}
    kept["data"]["path"] = None
    if more["labels"]:
        kept["data"]["labels"] = more["labels"]
    path = kept["model"].get("path")
    if path is not None and Path(path).expanduser().is_dir():
        kept["model"]["path"] = str(Path(path).expanduser().resolve())
    text = json.dumps({"form": form} | more | {"config": kept}, indent=2)
    (folder / NAME).write_text(text + "\n")


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def is_exported(folder: Path) -> bool:
    """Tell whether a folder was exported."""
    return (folder / NAME).is_file()


def read(folder: Path) -> dict[str, Any]:
    """Return the file's entries.

    Raises:
        ValueError: the file is not there, or its form is unknown to this version.
    """
    if not is_exported(folder):
        raise ValueError(f"{folder} is no exported folder: it has no {NAME}")
    about = read_json(folder / NAME)
    if about.get("form") not in FORMS:
        raise ValueError(f"form in {folder / NAME} must be one of {', '.join(FORMS)}")
    return about


def tree_of(about: dict[str, Any], overrides: Sequence[str] = ()) -> DictConfig:
    """Return the composed configuration that the file's entries stand for.

    Metrics that are modules are left out, because their code would run, and the file may be a
    stranger's.

    Args:
        about: the entries.
        overrides: go on top.
    """
    tree = composed(())
    data = dict(about["config"]["data"])
    metrics = [name for name in data.pop("metrics", []) if str(name).isidentifier()]
    for key in KEYS:
        tree[key] = data if key == "data" else about["config"][key]
    if metrics:
        OmegaConf.update(tree, "data.metrics", metrics, force_add=True)
    return with_labels(changed(tree, overrides), about["labels"])


def with_labels(tree: DictConfig, labels: Sequence[str] | None) -> DictConfig:
    """Set the model's class names where the task's are not set.

    Names that were read from other rows could have another order.

    Args:
        tree: composed; changed in place.
        labels: the model's class names; null if it has none.

    Raises:
        ValueError: the task has another number of classes.
    """
    if labels and not tree.data.get("labels"):
        OmegaConf.update(tree, "data.labels", list(labels), force_add=True)
    elif labels and len(tree.data.labels) != len(labels):
        raise ValueError(
            f"data.labels must name the model's {len(labels)} classes, got {len(tree.data.labels)}"
        )
    return tree


def name_labels(model: Any, labels: Sequence[str] | None) -> None:
    """Put class names into a transformers model's configuration; null changes nothing."""
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {name: number for number, name in enumerate(labels)}
