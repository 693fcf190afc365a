"""The docstrings set: masking, extraction, deduplication, splits and the cache."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fedpeft.cache import cache_folder
from fedpeft.config.load import load_config
from fedpeft.data.rows import docstrings, paragraphs
from tests.conftest import Runner

FAKES = {"fake-alpha": "alpha", "fake-beta": "beta"}
SHARED = "This {} sentence stands in both of the fake packages."


def content_hash(folder: Path) -> str:
    """Return the SHA-256 of the texts and labels of all splits, in their order."""
    digest = hashlib.sha256()
    for split in docstrings.SPLITS:
        for row in pq.read_table(folder / f"{split}.parquet").to_pylist():
            digest.update(json.dumps([split, row["text"], row["label"]]).encode() + b"\n")
    return digest.hexdigest()


def install(site: Path, distribution: str, package: str, sources: dict[str, str]) -> None:
    """Write a wheel's files to site-packages, with METADATA and RECORD.

    Args:
        site: the folder of packages.
        distribution: the wheel's name.
        package: the name by which it is imported.
        sources: texts by path in the package.
    """
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    for name, source in sources.items():
        path = site / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    (info / "RECORD").write_text("".join(f"{package}/{name},,\n" for name in sources))


def functions(*sentences: str) -> str:
    """Return Python code of functions with these docstrings."""
    return "".join(f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(sentences))


def sentences(package: str, count: int) -> list[str]:
    return [f"Return entry number {i} of the list in {package} form." for i in range(count)]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two fake packages of 20 sentences each.

    Both have one sentence more, which is equal where names are masked and case is ignored.
    """
    folder = tmp_path / "site"
    alpha, beta = sentences("alpha", 20), sentences("beta", 20)
    skipped = functions("This sentence of a test folder is never to be read.")
    install(
        folder,
        "fake-alpha",
        "alpha",
        {
            "__init__.py": functions(*alpha[:12], SHARED.format("NumPy")),
            "sub/more.py": functions(*alpha[12:]),
            "broken.py": "def f(:\n",
            "tests/test_more.py": skipped,
        },
    )
    shared = SHARED.format("torch").upper()
    twice = beta[0].replace("Return", "return")  # makes one row with beta[0]
    install(folder, "fake-beta", "beta", {"__init__.py": functions(*beta, twice, shared)})
    monkeypatch.syspath_prepend(str(folder))
    return folder


def rows(folder: Path, split: str) -> list[tuple[str, int]]:
    table = pq.read_table(folder / f"{split}.parquet").to_pylist()
    return [(row["text"], row["label"]) for row in table]


def all_rows(folder: Path) -> list[tuple[str, int]]:
    return [row for split in docstrings.SPLITS for row in rows(folder, split)]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("np.array of pd.Series", "package.array of package.Series"),
        ("PyTorch, pytorch and Py-Torch", "package, package and package"),
        ("torch.Tensor on LibTorch", "package.Tensor on Libpackage"),
        ("NumPyro and TORCH_LOGS", "packagero and package_LOGS"),
        ("scikit-learn, scikit_learn, sklearn.svm", "package, package, package.svm"),
        ("the scikit `sympy.Symbol`", "the package `package.Symbol`"),
        ("SciPy's networkx graph", "package's package graph"),
        ("Matplotlib: plt.show(), mpl_toolkits", "package: package.show(), package_toolkits"),
        ("HuggingFace / Hugging Face's HfApi", "package / package's packageApi"),
        ("huggingface.co/transformers", "package.co/package"),
        ("Pandas to_numpy from_nx nx.Graph", "package to_package from_package package.Graph"),
        ("Ray, ray.init, ~ray.data", "package, package.init, ~package.data"),
        ("RayCluster MyRayActor ray_actors", "packageCluster MypackageActor package_actors"),
        ("RAY_ADDRESS of KubeRay's raylet", "package_ADDRESS of package's package"),
        ("HFStorage on HF", "packageStorage on package"),
    ],
)
def test_mask_replaces_names_and_aliases(text: str, masked: str) -> None:
    assert docstrings.mask(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "array ARRAY NDArray Array grayscale XRay",
        "x-ray, X-ray and rays of Rayleigh",
        "a simple example, completely sampled",
        "NP-hard, NP and a PDF",
        "VectorChannel inputs knapsack",
        "a Transformer block",
    ],
)
def test_mask_leaves_other_words(text: str) -> None:
    assert docstrings.mask(text) == text


@pytest.mark.parametrize("name", sorted({*docstrings.PACKAGES, *docstrings.PACKAGES.values()}))
def test_mask_knows_every_package(name: str) -> None:
    assert docstrings.mask(f"the {name} library") == "the package library"


def test_labels_are_alphabetical() -> None:
    assert list(docstrings.PACKAGES) == sorted(docstrings.PACKAGES)
    assert len(docstrings.PACKAGES) == 10


def test_paragraphs_are_first_ones_of_every_kind_of_docstring() -> None:
    source = '''"""
Module on two
  lines.
   \t
Second paragraph.
"""
text = """No docstring."""
class A:
    r"""Class with \\d."""
    def method(self):
        "Method."
        def inner():
            """Inner."""
async def later():
    """Async."""
def none():
    pass
def computed():
    f"""No docstring {text}."""
if text:
    pass
else:
    try:
        def hidden():
            """In a branch."""
    except ValueError:
        def handled():
            """In a handler."""
'''
    assert paragraphs.paragraphs(source, "p.m") == [
        ("p.m", "Module on two lines."),
        ("p.m.A", "Class with \\d."),
        ("p.m.A.method", "Method."),
        ("p.m.A.method.inner", "Inner."),
        ("p.m.later", "Async."),
        ("p.m.hidden", "In a branch."),
        ("p.m.handled", "In a handler."),
    ]


def test_paragraphs_of_unparsable_sources_are_none() -> None:
    assert paragraphs.paragraphs("def f(:\n", "m") == []
    assert paragraphs.paragraphs(b'"""Nothing in UTF-8: \xff."""', "m") == []


def test_paragraphs_do_not_warn_of_invalid_escapes() -> None:
    assert paragraphs.paragraphs('"""A \\d."""\nx = 1 is 1\n', "m") == [("m", "A \\d.")]


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        ("Return four plain words aaaaaa", True),  # 30 characters
        ("Return four plain words aaaaa", False),
        ("Four words here " + "a" * 384, True),  # 400
        ("Four words here " + "a" * 385, False),
        ("(Return) `four` plain, words.....", True),
        ("Return array_1 of get_item x.y and", False),  # Return, of, and
        ("Return four plain words \x00 and more", False),
        ("Return four plain words \ud800 and more", False),
    ],
)
def test_is_sentence(text: str, usable: bool) -> None:
    assert docstrings.is_sentence(text) is usable


def test_distinct_drops_shared_texts_and_repeats() -> None:
    ordered = {"a": ["One", "both", "ONE", "Two"], "b": ["Both", "three"], "c": ["four"]}
    expected = {"a": ["One", "Two"], "b": ["three"], "c": ["four"]}
    assert docstrings.distinct(ordered) == expected


def test_sources_are_those_of_the_wheel_without_tests(site: Path) -> None:
    with (site / "fake_alpha-1.0.dist-info" / "RECORD").open("a") as record:
        record.write("../bin/tool.py,,\nalpha/data.txt,,\n")
    (site / "alpha" / "stray.py").write_text(functions("Not of the wheel, so not a source."))
    found = docstrings.sources("fake-alpha", "alpha")
    assert {module: path.relative_to(site).as_posix() for module, path in found} == {
        "alpha": "alpha/__init__.py",
        "alpha.sub.more": "alpha/sub/more.py",
        "alpha.broken": "alpha/broken.py",
    }


def test_extract_gives_texts_to_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docstrings.os, "cpu_count", lambda: 2)
    names = {"a": ["a0", "a1", "a2"], "b": ["b0", "b1"]}
    files = {
        package: [(f"{package}.{name}", tmp_path / f"{name}.py") for name in of]
        for package, of in names.items()
    }
    for _, path in (file for of in files.values() for file in of):
        path.write_text(f'"""Text of {path.stem}."""')
    pairs = {package: sorted(of) for package, of in docstrings.extract(files).items()}
    assert pairs == {
        "a": [("a.a0", "Text of a0."), ("a.a1", "Text of a1."), ("a.a2", "Text of a2.")],
        "b": [("b.b0", "Text of b0."), ("b.b1", "Text of b1.")],
    }


def test_build_keeps_each_usable_sentence_once(site: Path, tmp_path: Path) -> None:
    pairs = all_rows(docstrings.build(20, tmp_path / "cache", FAKES))
    # The hash decides which of two spellings of beta's first sentence stays.
    expected = {(text, 0) for text in sentences("alpha", 20)}
    expected |= {(text.casefold(), 1) for text in sentences("beta", 20)}
    assert len(pairs) == 40
    assert {(text.casefold() if label else text, label) for text, label in pairs} == expected


def test_a_row_names_what_it_documents(site: Path, tmp_path: Path) -> None:
    folder = docstrings.build(20, tmp_path, FAKES)
    tables = [pq.read_table(folder / f"{split}.parquet") for split in docstrings.SPLITS]
    names = {row["text"]: row["name"] for table in tables for row in table.to_pylist()}
    assert names[sentences("alpha", 20)[3]] == "alpha.f3"
    assert names[sentences("alpha", 20)[13]] == "alpha.sub.more.f1"
    assert names[sentences("beta", 20)[7]] == "beta.f7"


def test_build_splits_each_label_80_10_10(site: Path, tmp_path: Path) -> None:
    folder = docstrings.build(20, tmp_path, FAKES)
    counts = {s: Counter(label for _, label in rows(folder, s)) for s in docstrings.SPLITS}
    assert counts == {
        "train": {0: 16, 1: 16},
        "validation": {0: 2, 1: 2},
        "test": {0: 2, 1: 2},
    }


def test_build_mixes_labels(site: Path, tmp_path: Path) -> None:
    labels = [label for _, label in rows(docstrings.build(20, tmp_path, FAKES), "train")]
    assert labels not in (sorted(labels), sorted(labels, reverse=True))


def test_larger_set_keeps_rows_in_their_split(site: Path, tmp_path: Path) -> None:
    small, large = (docstrings.build(count, tmp_path, FAKES) for count in (10, 20))
    for split in docstrings.SPLITS:
        assert set(rows(small, split)) < set(rows(large, split))


def test_builds_are_equal_and_their_hash_sees_every_change(site: Path, tmp_path: Path) -> None:
    first = docstrings.build(20, tmp_path / "a", FAKES)
    second = docstrings.build(20, tmp_path / "b", FAKES)
    assert first != second
    digest = content_hash(first)
    assert content_hash(second) == digest
    table = pq.read_table(second / "test.parquet")
    pq.write_table(table, second / "test.parquet", compression="gzip")  # other bytes, same rows
    assert content_hash(second) == digest
    for change in ("text", "label"):
        changed = table.to_pylist()
        changed[0][change] = {"text": "Another.", "label": 1 - changed[0]["label"]}[change]
        pq.write_table(table.from_pylist(changed, table.schema), second / "test.parquet")
        assert content_hash(second) != digest


def test_build_uses_the_cache(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = docstrings.build(10, tmp_path, FAKES)

    def extract(files: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(docstrings, "extract", extract)
    assert docstrings.build(10, tmp_path, FAKES) == folder
    metadata = site / "fake_beta-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    with pytest.raises(AssertionError, match="built again"):
        docstrings.build(10, tmp_path, FAKES)  # another version, another key


def test_unfinished_folder_is_ignored_and_none_is_left(site: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    name = docstrings.build(10, tmp_path, FAKES).name
    stale = cache / f".{name}.killed"
    stale.mkdir(parents=True)
    (stale / "train.parquet").write_bytes(b"half")
    folder = docstrings.build(10, cache, FAKES)
    assert len(all_rows(folder)) == 20
    assert {path.name for path in cache.iterdir()} == {name, stale.name}


def test_second_of_two_racing_builds_leaves_the_first(site: Path, tmp_path: Path) -> None:
    folder = docstrings.build(10, tmp_path / "cache", FAKES)
    before = content_hash(folder)
    other = {split: [docstrings.Row("Another text.", 0, "a.f")] for split in docstrings.SPLITS}
    docstrings.write(other, tuple(FAKES), folder)  # as a process that began without the folder
    assert content_hash(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    row: Any = docstrings.Row
    unwritable = {"train": [row("text", 0, "a")], "test": [row("text", "no label", "b")]}
    with pytest.raises(ValueError, match="no label"):
        docstrings.write(unwritable, ("a",), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_load_dataset_reads_splits_and_label_names(site: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    folder = docstrings.build(10, tmp_path / "cache", FAKES)
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "hf"))
    assert {name: len(table) for name, table in loaded.items()} == {
        "train": 16,
        "validation": 2,
        "test": 2,
    }
    assert loaded["train"].features["label"].names == list(FAKES)
    assert list(zip(loaded["test"]["text"], loaded["test"]["label"], strict=True)) == rows(
        folder, "test"
    )


def test_build_runs_where_threads_and_no_importable_main_are(site: Path, tmp_path: Path) -> None:
    script = (
        "import sys, threading\n"
        "sys.path[:0] = sys.argv[1:3]\n"
        "from pathlib import Path\n"
        "from fedpeft.data.rows import docstrings\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        f"print(docstrings.build(10, Path(sys.argv[3]), {FAKES!r}))\n"
    )
    root = str(Path(docstrings.__file__).parents[2])
    command = [sys.executable, "-", root, str(site), str(tmp_path / "cache")]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=True)
    here = content_hash(docstrings.build(10, tmp_path / "here", FAKES))
    # Equal although hash() of a text differs by process.
    assert content_hash(Path(done.stdout.strip())) == here
    assert done.stderr == ""


def test_missing_package_is_named(site: Path, tmp_path: Path) -> None:
    packages = FAKES | {"fake-absent": "absent"}
    with pytest.raises(ValueError, match="needs the package fake-absent, not installed"):
        docstrings.build(10, tmp_path, packages)


def test_too_few_rows_are_counted(site: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fake-alpha has 20 docstrings.*rows_per_label=21"):
        docstrings.build(21, tmp_path / "cache", FAKES)
    assert not (tmp_path / "cache").exists()


def test_rows_per_label_leaves_no_split_empty(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows_per_label must be >= 10, got 9"):
        docstrings.build(9, tmp_path)


@pytest.mark.slow
def test_the_default_set_names_no_package_and_trains(run: Runner) -> None:
    summary = run(
        "model=minilm",
        "model.path=null",
        "data=docstrings",
        "data.path=null",
        "data.max_validation_rows=60",
        "data.max_test_rows=60",
        "method=scl",
        "method.init=random_pinv",
        "method.rank=64",
        "num_rounds=1",
    )
    errors = list(summary["initial_error"].values())
    assert len(errors) == 6 and all(0.9 < error < 1 for error in errors)
    assert summary["data"]["rows"] == {"train": 8000, "validation": 60, "test": 60}
    assert summary["weights_sha256"] == load_config([]).model.sha256
    assert summary["initial"]["validation_loss"] != summary["final"]["validation_loss"]

    folder = docstrings.build(1000, cache_folder() / "docstrings")  # the run has built it
    pairs = all_rows(folder)
    assert Counter(label for _, label in pairs) == dict.fromkeys(range(10), 1000)
    assert len({text.casefold() for text, _ in pairs}) == 10_000
    assert len(rows(folder, "test")) == 1000
    # These patterns are independent of the module's: identifiers are cut at case and underscore.
    long = re.compile(r"matplotlib|pyplot|networkx|numpy|pandas|scikit|sklearn|scipy|sympy")
    long_cased = re.compile(r"[Pp]y-?[Tt]orch|\b[Tt]orch|TORCH|(?i:transformers|hugging.?face)")
    short = {"ray", "mpl", "plt", "np", "nx", "pd", "hf", "torch"}
    for text, _ in pairs:
        assert not long.search(text.casefold()), text
        assert not long_cased.search(text), text
        parts = re.findall(r"[A-Z]?[a-z]+", re.sub(r"(?i)x-rays?", "", text))
        named = {part for part in parts if part.casefold() in short}
        assert named <= {"Np", "Nx", "Pd"}, text
