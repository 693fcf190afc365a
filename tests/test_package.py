"""The wheel runs without the checkout, and Flower's bundle has format 1."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from fedpeft import versions

ROOT = Path(__file__).parent.parent
LICENSE = (ROOT / "LICENSE").read_text()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, built from the checkout."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; it is one of dev's")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("fedpeft-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_types_configuration_and_licence(unpacked: Path) -> None:
    files = {p.relative_to(ROOT) for f in ("fedpeft", "conf") for p in (ROOT / f).rglob("*.*")}
    wanted = {
        str(path if path.parts[0] == "fedpeft" else "fedpeft" / path)
        for path in files
        if path.suffix in (".py", ".yaml", ".typed", ".j2")
    }
    assert {"fedpeft/py.typed", "fedpeft/conf/config.yaml", "fedpeft/cli.py"} < wanted
    in_wheel = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}
    (information,) = unpacked.glob("*.dist-info")
    assert {path for path in in_wheel if not path.startswith(information.name)} == wanted
    assert (information / "licenses/LICENSE").read_text() == LICENSE
    assert "fedpeft = fedpeft.cli:main" in (information / "entry_points.txt").read_text()


@pytest.mark.slow
def test_the_wheel_runs_away_from_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import fedpeft.cli, fedpeft.config.compose as compose, sys\n"
        "print(compose.CONF, file=sys.stderr)\n"
        "fedpeft.cli.main()"
    )
    arguments = ["params", "--json", "model=roberta_base", "data=sst2", "method=fedtt"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(unpacked / "fedpeft/conf") in done.stderr.splitlines()
    counts = json.loads(done.stdout)
    assert counts["fedtt"]["trained"] == counts["fedtt"]["sent_up"] == [60_634, 60_634]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # flwr's own use
def test_flower_s_bundle_is_of_format_1_and_holds_the_licence(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_files
    from flwr.cli.utils import collect_files

    # Without the environment, whose files Flower would read before it leaves them out.
    out = shutil.ignore_patterns(".venv", ".git", "site", "runs", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=out)
    bundle, metadata = build_fab_from_files(collect_files(tmp_path / "checkout"))
    assert metadata.fab_format_version == 1
    assert metadata.flwr_version_min == "1.41"
    assert len(bundle) < 10 * 2**20
    with zipfile.ZipFile(BytesIO(bundle)) as archive:
        assert archive.read("LICENSE").decode() == LICENSE
        names = set(archive.namelist())
    assert {"fedpeft/server/app.py", "fedpeft/client/app.py", "conf/config.yaml"} < names
    assert not any(name.startswith(("tests/", "results/", "benchmarks/")) for name in names)


def test_the_commit_is_that_of_the_checkout_and_says_whether_files_were_changed(
    tmp_path: Path,
) -> None:
    def git(*words: str) -> str:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        said = subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True)
        return said.stdout.decode().strip()

    git("init", "-q")
    for name in ("fedpeft/code.py", "conf/a.yaml", "results/table.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("tag", "v1")
    (tmp_path / "run.log").write_text("a file that git does not know is no change of the code")
    head = git("rev-parse", "HEAD")
    assert versions.commit.__wrapped__(tmp_path) == head
    (tmp_path / "results/table.md").write_text("a study writes it, too")
    assert versions.commit.__wrapped__(tmp_path) == head
    for name in ("fedpeft/code.py", "conf/a.yaml"):
        (tmp_path / name).write_text("2")
        assert versions.commit.__wrapped__(tmp_path) == f"{head}-dirty"
        git("checkout", name)


@pytest.mark.parametrize(
    ("origin", "commit"),
    [
        ('{"url": "https://a.b/c.git", "vcs_info": {"vcs": "git", "commit_id": "4f2a"}}', "4f2a"),
        ('{"url": "file:///c", "dir_info": {}}', None),
        (None, None),  # from an index
    ],
)
def test_the_commit_without_a_checkout_is_what_pip_installed_from(
    origin: str | None, commit: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            return origin if name == "direct_url.json" else None

    monkeypatch.setattr(versions, "distribution", lambda name: Installed())
    assert versions.commit.__wrapped__(tmp_path) == commit


def test_without_git_the_commit_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".git").mkdir()
    assert versions.commit.__wrapped__(tmp_path) is None  # a folder that is no repository
    monkeypatch.setenv("PATH", "")
    assert versions.commit.__wrapped__(tmp_path) is None
