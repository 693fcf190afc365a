"""Weights inside of installed Python packages; other formats are converted once into the cache."""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedpeft.cache import cache_folder, cached_folder
from fedpeft.models.from_onnx import from_onnx
from fedpeft.models.hub import sha256_of

# Functions import transformers, because it takes seconds.

FORMAT = 1  # part of the cache's key: raise it when a conversion writes other files
Lacking = Mapping[str, Any]


class Converter(NamedTuple):
    """Makes a folder that transformers reads out of one file.

    Attributes:
        module: reads the file.
        complete: the file holds weights, configuration and tokenizer; else only weights.
        write: is given the file, an empty folder, and what the file lacks.
    """

    module: str
    complete: bool
    write: Callable[[Path, Path, Lacking], None]


def reads_as_is(package: str) -> bool:
    """Tell whether transformers reads the weights where the package has them.

    Args:
        package: ``module/folder`` or ``module/file``.
    """
    return Path(package).suffix not in CONVERTERS


def readable(package: str, install: str | None, sha256: str | None, lacking: Lacking) -> str:
    """Return the folder that transformers reads.

    Args:
        package: ``module/folder``, ``module/file.gguf`` or ``module/file.onnx`` of an installed
            package.
        install: the command that installs it, for the error.
        sha256: the hash that the file must have; null does not check. A folder is not checked here.
        lacking: fields that an ONNX file does not hold, see ``from_onnx``.

    Raises:
        ValueError: the package is not installed, the file has another hash or other tensors, or
            the cache cannot be written.
    """
    if reads_as_is(package):
        return str(located(package, install))
    kind = Path(package).suffix
    file = located(package, install, (CONVERTERS[kind].module,))
    more = () if CONVERTERS[kind].complete else (json.dumps(lacking, sort_keys=True),)
    return converted(file, sha256, cache_folder(), *more)


def located(package: str, install: str | None, needed: Iterable[str] = ()) -> Path:
    """Return the path of a package's folder or file; the package is not imported.

    Args:
        package: ``module/folder/...``.
        install: the command that installs it, for the error.
        needed: further modules, such as one that reads the file.

    Raises:
        ValueError: a module is not installed.
    """
    module, _, inner = package.partition("/")
    specs = {name: find_spec(name) for name in (module, *needed)}
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]
    if missing:
        raise ValueError(
            f"the model's weights need {' and '.join(missing)}, not installed: run {install}, or "
            "set model.path"
        )
    return Path(str(specs[module].origin)).parent / inner  # type: ignore[union-attr]


@cache  # because hashing the file and checking what is cached take half a second
def converted(file: Path, sha256: str | None, within: Path, lacking: str = "") -> str:
    """Return the folder with a file's model and its processor, which is made if it is not there.

    Args:
        file: the file of weights.
        sha256: the hash that the file must have; null does not check.
        within: the cache's folder; it only keeps apart the results for two cache folders.
        lacking: fields that the file does not hold, as JSON; empty if it holds all.

    Raises:
        ValueError: the file has another hash or other tensors, or the cache cannot be written.
    """
    actual = sha256_of([file])
    if sha256 not in (None, actual):
        raise ValueError(
            f"{file} has sha256 {actual}, expected {sha256}: install the pinned package again"
        )
    key = [FORMAT, file.suffix[1:], actual, *([lacking] if lacking else [])]
    return str(cached_folder(key, lambda folder: _convert(file, folder, lacking)))


def _convert(file: Path, folder: Path, lacking: str) -> None:
    """Write a file's model and its processor, without transformers' progress bars."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    CONVERTERS[file.suffix].write(file, folder, json.loads(lacking or "{}"))


def from_gguf(file: Path, folder: Path, _lacking: Lacking) -> None:
    """Write a GGUF file's weights in bfloat16, its configuration and its tokenizer.

    Args:
        file: a GGUF file of a causal language model that transformers knows.
        folder: an empty folder, which transformers reads then.
        _lacking: nothing, because such a file holds all.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(file.parent), file.name
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.config.__dict__.pop("quantization_config", None)  # the saved weights are plain
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


CONVERTERS = {
    ".gguf": Converter("gguf", True, from_gguf),
    ".onnx": Converter("onnx", False, from_onnx),
}
