"""Weights inside of installed Python packages; a GGUF file is converted once into the cache."""

from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from fedpeft.cache import cache_folder, cached_folder
from fedpeft.models.hub import sha256_of

# Functions import transformers, because it takes seconds.

FORMAT = 1  # part of the cache's key: raise it when a conversion writes other files
GGUF = ".gguf"


def reads_as_is(package: str) -> bool:
    """Tell whether transformers reads the weights where the package has them.

    Args:
        package: ``module/folder`` or ``module/file.gguf``.
    """
    return not package.endswith(GGUF)


def readable(package: str, install: str | None, sha256: str | None) -> str:
    """Return the folder that transformers reads.

    Args:
        package: ``module/folder`` or ``module/file.gguf`` of an installed package.
        install: the command that installs it, for the error.
        sha256: of the GGUF file; null does not check. A folder is not checked here.

    Raises:
        ValueError: the package is not installed, the file has another hash, or the cache cannot be
            written.
    """
    if reads_as_is(package):
        return str(located(package, install))
    return converted(located(package, install, ("gguf",)), sha256, cache_folder())


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
def converted(file: Path, sha256: str | None, within: Path) -> str:
    """Return the folder with a GGUF file's model and tokenizer, which is made if it is not there.

    Args:
        file: the GGUF file.
        sha256: that it must have; null does not check.
        within: the cache's folder.

    Raises:
        ValueError: the file has another hash, or the cache cannot be written.
    """
    actual = sha256_of([file])
    if sha256 not in (None, actual):
        raise ValueError(
            f"{file} has sha256 {actual}, expected {sha256}: install the pinned package again"
        )
    return str(cached_folder([FORMAT, "gguf", actual], lambda folder: from_gguf(file, folder)))


def from_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file's weights in bfloat16, its configuration and its tokenizer.

    Args:
        file: of a causal language model that transformers knows.
        folder: an empty folder, which transformers reads then.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
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
