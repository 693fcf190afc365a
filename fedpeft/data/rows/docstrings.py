"""The docstrings set: sentences from ten installed packages, labelled by package."""

import hashlib
import json
import os
import re
import shutil
import string
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from fedpeft.data.rows import paragraphs

# A function imports pyarrow and datasets, because built rows are read without them.

# Import name by distribution, in alphabetical order; the position is the label. The standard
# library is left out, because its docstrings depend on Python's patch version.
PACKAGES = {
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "pandas": "pandas",
    "ray": "ray",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "sympy": "sympy",
    "torch": "torch",
    "transformers": "transformers",
}
SPLITS = ("train", "validation", "test")
FORMAT = 2  # part of the cache key: raise it when the same packages give other rows
MASK = "package"  # one piece to a BERT tokenizer and neutral between labels
LENGTH = range(30, 401)  # characters of a row's text
MIN_WORDS = 4
MIN_ROWS = 10  # per label: one for validation, one for test

# Folders that hold tests, or code of other projects.
SKIPPED = {
    *("test", "tests"),
    *("_vendor", "_vendored", "externals"),
    *("third_party", "thirdparty", "thirdparty_files"),
    *("array_api_compat", "array_api_extra", "_uarray", "cloudpickle"),
    "_numpy",  # torch's copy of NumPy's functions and their docstrings
}

# Names that occur in no other word. They are masked anywhere, in `NumPyro` too.
_ANYWHERE = (
    *("matplotlib", "pyplot", "mpltype", "mathmpl", "networkx", "numpy", "pandas", "scipy"),
    *("scikit[-_ ]?learn", "scikit", "sklearn", "sympy", "py[-_ ]?torch", "transformers"),
    *("hugging[-_ ]?face", "anyscale", "kuberay"),
)
# Also masked anywhere, but case counts, because the torch in VectorChannel is none.
_CASED = ("[Tt]orch", "TORCH", "[Rr]ay(?:let|llm|cluster|submit|if|ignore)")
# Names that occur in other words, as in array and completion. They are masked as a word or as a
# part of an identifier.
_PARTS = ("ray", "mpl", "plt", "hf")
# Masked in lower case only, because NP and PD have other meanings, as in NP-hard.
_LOWER_PARTS = ("np", "nx", "pd")


def _part(name: str) -> str:
    """Return a pattern of `name`, `Name` and `NAME` where snake or camel case sets them apart."""
    forms = (
        rf"(?<![A-Za-z]){name}(?![a-z])",
        rf"(?<![A-Z]){name.title()}(?![a-z])",
        rf"(?<![A-Z]){name.upper()}(?![a-z]|[A-Z](?![a-z]))",
    )
    not_x_ray = "(?<![xX]-)" if name == "ray" else ""  # the radiation is no package
    return f"{not_x_ray}(?:{'|'.join(forms)})"


_NAMES = re.compile(
    "|".join(
        [
            f"(?i:{'|'.join(_ANYWHERE)})",
            *_CASED,
            *map(_part, _PARTS),
            *(f"(?<![A-Za-z]){name}(?![a-z])" for name in _LOWER_PARTS),
        ]
    )
)


def mask(text: str) -> str:
    """Replace the names and usual aliases of all ten packages by `package`."""
    return _NAMES.sub(MASK, text)


class Row(NamedTuple):
    """A row of the set.

    Attributes:
        text: first paragraph of a docstring, with the packages' names masked.
        label: position of its package.
        name: dotted name of the documented object, with its module: ``numpy.linalg.norm``.
    """

    text: str
    label: int
    name: str


def is_sentence(text: str) -> bool:
    """Return true if a text has the length, words and characters that a row needs."""
    words = sum(word.strip(string.punctuation).isalpha() for word in text.split())
    # Control characters and lone surrogates, which parquet cannot hold, are not printable.
    return len(text) in LENGTH and words >= MIN_WORDS and text.isprintable()


def build(rows_per_label: int, cache_dir: Path, packages: Mapping[str, str] = PACKAGES) -> Path:
    """Build the set from installed packages, or find it in the cache.

    Args:
        rows_per_label: rows of each class over all three splits, 80/10/10. The rows of a smaller
            set are rows of a larger one, in the same split.
        cache_dir: parent of the set's folder; made if missing.
        packages: import name by distribution; the position is the label.

    Returns:
        A folder with train.parquet, validation.parquet and test.parquet; columns of ``Row``.

    Raises:
        ValueError: a package is not installed or has fewer rows, or rows_per_label < 10.
    """
    if rows_per_label < MIN_ROWS:
        raise ValueError(f"rows_per_label must be >= {MIN_ROWS}, got {rows_per_label}")
    versions = {name: _distribution(name).version for name in packages}
    key = _sha256(json.dumps([FORMAT, rows_per_label, packages, versions], sort_keys=True))
    folder = cache_dir / f"docstrings-{rows_per_label}-{key[:16]}"
    if not folder.is_dir():
        write(_split(_candidates(packages), rows_per_label), tuple(packages), folder)
    return folder


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _distribution(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise ValueError(f"the docstrings set needs the package {name}, not installed") from error


def sources(distribution: str, package: str) -> list[tuple[str, Path]]:
    """Return module and file of an installed package's code, without tests and vendored code.

    The package is not imported. The wheel lists its files, so a file that was added
    after the installation is left out.

    Raises:
        ValueError: the package is not installed, or has no list of files.
    """
    files = _distribution(distribution).files
    if files is None:
        raise ValueError(f"{distribution} has no list of its files: install it from a wheel")
    return [
        (".".join(file.with_suffix("").parts).removesuffix(".__init__"), Path(str(file.locate())))
        for file in files
        if file.suffix == ".py" and file.parts[0] == package and SKIPPED.isdisjoint(file.parts)
    ]


def _candidates(packages: Mapping[str, str]) -> dict[str, list[Row]]:
    """Return rows of each package whose masked sentences no other has, ordered by SHA-256.

    If several objects share a sentence, the row has the name that is first in the alphabet.
    """
    extracted = extract({name: sources(name, package) for name, package in packages.items()})
    named: dict[str, dict[str, str]] = {}
    for package, pairs in extracted.items():
        of_masked = named[package] = {}
        for text, name in {text: name for name, text in sorted(pairs, reverse=True)}.items():
            masked = mask(text)
            of_masked[masked] = min(name, of_masked.get(masked, name))
    sentences = {package: filter(is_sentence, texts) for package, texts in named.items()}
    kept = distinct({package: sorted(texts, key=_sha256) for package, texts in sentences.items()})
    return {
        package: [Row(text, label, named[package][text]) for text in kept[package]]
        for label, package in enumerate(packages)
    }


def distinct(ordered: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Keep the first of texts that differ in case only, and none that two packages share."""
    folded: dict[str, dict[str, str]] = {name: {} for name in ordered}
    for name, texts in ordered.items():
        for text in texts:
            folded[name].setdefault(text.casefold(), text)
    packages = Counter(chain.from_iterable(folded.values()))
    return {
        name: [text for key, text in by_fold.items() if packages[key] == 1]
        for name, by_fold in folded.items()
    }


def extract(files: Mapping[str, Iterable[tuple[str, Path]]]) -> dict[str, list[tuple[str, str]]]:
    """Return the paragraphs of each package's files, parsed in one process a core, at most 8.

    The processes run paragraphs.py as a script, because multiprocessing's spawn would import the
    caller's main module again, and its fork is unsafe if the caller has threads (torch, Ray).

    Args:
        files: module and file, by package.
    """
    jobs = [(package, (module, str(path))) for package, of in files.items() for module, path in of]
    workers = min(os.cpu_count() or 1, 8)
    parts = [jobs[start::workers] for start in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(_parse_elsewhere, [[file for _, file in part] for part in parts]))
    pairs: dict[str, list[tuple[str, str]]] = {package: [] for package in files}
    for (package, _), of_file in zip(chain(*parts), chain(*done), strict=True):
        pairs[package] += [(name, text) for name, text in of_file]
    return pairs


def _parse_elsewhere(files: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Return the paragraphs of each module and file, parsed by another process."""
    # -I keeps the script's folder off sys.path, where a neighbour could shadow a module.
    command = [sys.executable, "-I", paragraphs.__file__]
    done = subprocess.run(command, input=json.dumps(files).encode(), capture_output=True)
    if done.returncode:
        raise RuntimeError(f"parsing docstrings failed: {done.stderr.decode(errors='replace')}")
    return json.loads(done.stdout)


def _split(candidates: Mapping[str, list[Row]], rows_per_label: int) -> dict[str, list[Row]]:
    """Return the first rows of each label: 8 of every ten train, 1 validates and 1 tests.

    The position decides, because a cut at 80 % would move test rows of a small set into the train
    rows of a larger one.
    """
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for package, of in candidates.items():
        if len(of) < rows_per_label:
            raise ValueError(
                f"{package} has {len(of)} docstrings to use, rows_per_label={rows_per_label} "
                "must not be more"
            )
        for position, row in enumerate(of[:rows_per_label]):
            split = {8: "validation", 9: "test"}.get(position % 10, "train")
            rows[split].append(row)
    return {split: sorted(rows[split], key=lambda row: _sha256(row.text)) for split in SPLITS}


def write(rows: Mapping[str, list[Row]], labels: tuple[str, ...], folder: Path) -> None:
    """Write the splits beside the folder and rename, so that it is there whole or not at all.

    Args:
        rows: each split's rows, by split; each split becomes a Parquet file.
        labels: names of the label's numbers.
        folder: is left as it is if it exists, because another process was first.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Features, Value

    # The schema carries the features, so load_dataset finds the label's names.
    label = ClassLabel(names=list(labels))
    schema = Features(text=Value("string"), label=label, name=Value("string")).arrow_schema
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        for split, of in rows.items():
            table = pa.Table.from_pylist([row._asdict() for row in of], schema=schema)
            pq.write_table(table, unfinished / f"{split}.parquet")
        os.replace(unfinished, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same rows
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
