"""Disks that are full and folders that cannot be written: real ones, mounted for one process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from fedpeft.cache import cached, remembered
from fedpeft.simulation.launch import run as launched
from tests.conftest import ROOT, quiet

RUN = "import sys; from fedpeft.cli import main; main()"
ADVICE = "give FEDPEFT_CACHE a folder that can be written and has room"
CACHES = ("FEDPEFT_CACHE", "FEDPEFT_STATE", "HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME")
Mounted = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def mounted() -> Mounted:
    """``mounted("mount ...", python code, arguments)`` runs code where something is mounted.

    Nobody else sees the mount, and it ends with the process.
    """
    own = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]

    def run(
        mount: str, code: str, *arguments: str, **variables: str
    ) -> "subprocess.CompletedProcess":
        environment = {k: v for k, v in os.environ.items() if k not in CACHES}
        script = f'{mount} && exec "$@"'
        command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
        return subprocess.run(
            [*own, "sh", "-ec", script, "sh", *command],
            env={**environment, "PYTHONPATH": str(ROOT), **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )

    try:
        tried = run("mount -t tmpfs tmpfs /mnt", "")
    except FileNotFoundError:
        pytest.skip("unshare is not installed, so no full disk can be mounted")
    if tried.returncode:
        pytest.skip(f"mounting is not allowed here: {tried.stderr.strip()}")
    return run


def tmpfs(folder: Path, size: str) -> str:
    folder.mkdir(exist_ok=True)
    return f"mount -t tmpfs -o size={size} tmpfs '{folder}'"


def read_only(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    return f"mount --bind '{folder}' '{folder}' && mount -o remount,ro,bind '{folder}'"


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


# --- entries --------------------------------------------------------------------------------------

ENTRIES = """
import json, os, sys
import numpy as np
from fedpeft.cache import cache_folder, cached, remembered

built = []
def build():
    built.append(1)
    return {"a": np.arange(100_000), "b": np.ones(3)}

results = [cached([name], build) for name in ("x", "x", "y")]
assert all((r["a"] == np.arange(100_000)).all() and r["b"].tolist() == [1, 1, 1] for r in results)
assert not any(array.flags.writeable for r in results for array in r.values())
assert remembered(["x"], lambda: "z" * 100_000) == "z" * 100_000
names = [n for _, _, names in os.walk(cache_folder()) for n in names if not n.endswith(".lock")]
print(json.dumps([len(built), names]))
"""


@pytest.mark.parametrize(
    ("mount", "reason"),
    [
        (lambda folder: tmpfs(folder, "64k"), "No space left on device"),
        (read_only, "Read-only file system"),
    ],
)
def test_entries_that_cannot_be_written_stay_in_memory(
    mounted: Mounted, mount: Callable[[Path], str], reason: str, tmp_path: Path
) -> None:
    """One warning stands for all; nothing half written takes the room that is left."""
    cache = tmp_path / "cache"
    done = mounted(mount(cache), ENTRIES, FEDPEFT_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        f"cannot write the cache {cache} ({reason}): the run goes on without it and encodes rows "
        f"in each process; {ADVICE}\n"
    )
    assert json.loads(done.stdout) == [3, []]


def test_a_read_only_cache_that_is_whole_is_used(
    mounted: Mounted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("FEDPEFT_CACHE", str(cache))
    for name in ("x", "y"):
        cached([name], lambda: {"a": np.arange(100_000), "b": np.ones(3)})
    remembered(["x"], lambda: "z" * 100_000)
    again = mounted(read_only(cache), ENTRIES, FEDPEFT_CACHE=str(cache))
    built, names = json.loads(again.stdout)
    assert again.stderr == "" and built == 0
    assert names.count("a.npy") == names.count("sums.json") == 2 and len(names) == 7


WRITERS = """
import sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from fedpeft.files import replacing

path = Path(sys.argv[1])
path.write_text("before")
try:
    with replacing(path) as draft:
        if sys.argv[2] == "text":
            draft.write_text("x" * 100_000)
        else:
            save_file({"x": np.ones(100_000)}, draft)
except OSError as error:
    print(type(error).__name__, error.errno, error.filename == str(path), error)
print(path.read_text(), [p.name for p in path.parent.iterdir()])
"""


@pytest.mark.parametrize("kind", ["text", "safetensors"])
def test_a_file_that_has_no_room_is_named(mounted: Mounted, kind: str, tmp_path: Path) -> None:
    """The file of before stays, and the draft goes."""
    file = tmp_path / "disk" / "file"
    done = mounted(tmpfs(file.parent, "64k"), WRITERS, str(file), kind)
    assert done.stdout.splitlines() == [
        f"Unwritten 28 True cannot write {file}: No space left on device",
        "before ['file']",
    ], done.stderr


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture
def arguments(base: list[str], tmp_path: Path) -> list[str]:
    given = ["method=fedsa_lora", "method.rank=4", f"run_dir={tmp_path / 'run'}"]
    return ["run", "--json", *base, *given]


def sentence(done: "subprocess.CompletedProcess[str]") -> str:
    """Return what a refused run said last; it must be its own sentence."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("fedpeft: ")
    return last.removeprefix("fedpeft: ")


def sha256(arguments: Sequence[str]) -> str:
    (folder,) = [a.removeprefix("run_dir=") for a in arguments if a.startswith("run_dir=")]
    return json.loads((Path(folder) / "summary.json").read_text())["shared_state_sha256"]


@pytest.mark.slow
def test_a_home_that_cannot_be_written(
    mounted: Mounted, arguments: list[str], tmp_path: Path
) -> None:
    """FEDPEFT_CACHE suffices, and then the tables of the library datasets lie there too."""
    home, cache = tmp_path / "home", tmp_path / "cache"
    done = mounted(read_only(home), RUN, *arguments, HOME=str(home))
    assert sentence(done) == (
        f"cannot write the cache {home}/.cache (Read-only file system): {ADVICE}"
    )
    arguments[-1] += "2"
    done = mounted(read_only(home), RUN, *arguments, HOME=str(home), FEDPEFT_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert [name for name in files(cache / "datasets") if name.endswith(".arrow")]
    assert "sums.json" in files(cache / "encoded") and files(home) == []


@pytest.mark.slow
def test_a_cache_without_room_changes_no_result(
    mounted: Mounted, arguments: list[str], tmp_path: Path
) -> None:
    """The rows are in memory, so the run goes on; the tables of datasets have room elsewhere."""
    small, tables = tmp_path / "small", str(tmp_path / "tables")
    variables = {"HF_DATASETS_CACHE": tables, "FEDPEFT_CACHE": str(small)}
    done = mounted(tmpfs(small, "8k"), RUN, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot write the cache") == 1 and "Traceback" not in done.stderr
    roomy = launched([*arguments[2:-1], f"run_dir={tmp_path / 'roomy'}"], quiet())
    assert roomy["shared_state_sha256"] == sha256(arguments)


@pytest.mark.slow
def test_tables_without_room_end_a_run_with_one_sentence(
    mounted: Mounted, arguments: list[str], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    done = mounted(tmpfs(small, "16k"), RUN, *arguments, FEDPEFT_CACHE=str(small))
    assert sentence(done) == (
        f"cannot write the cache {small}/datasets (No space left on device): {ADVICE}"
    )


@pytest.mark.slow
def test_a_run_directory_without_room(
    mounted: Mounted, arguments: list[str], tmp_path: Path
) -> None:
    """The sentence names the file; what was written before can be read."""
    disk = tmp_path / "disk"
    arguments[-1] = f"run_dir={disk}/run"
    done = mounted(
        tmpfs(disk, "64k"), RUN, *arguments, "num_rounds=20", FEDPEFT_CACHE=str(tmp_path / "cache")
    )
    said = sentence(done)  # the server's, or the clients' if theirs are the files without room
    assert f"cannot write {disk}/run/" in said and ": No space left on device" in said
