"""The packages whose versions a run saves, shows and compares, and fedpeft's own commit."""

import json
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

SHOWN = ("fedpeft", "flwr", "torch", "transformers")  # where there is room for few
# They decide a run's numbers.
DECIDING = (*SHOWN, "flwr-datasets", "peft", "datasets", "ray", "numpy")
CODE = ("fedpeft", "conf")  # folders that decide them, too; a run writes into others


def installed() -> dict[str, str]:
    """Return the versions of Python and of the packages in ``DECIDING`` that are installed."""
    versions = {"python": platform.python_version()}
    for name in DECIDING:
        with suppress(PackageNotFoundError):  # a run in one process does without ray
            versions[name] = version(name)
    return versions


@cache
def commit(root: Path = Path(__file__).parents[1]) -> str | None:
    """Return the commit of fedpeft's code, because the version is the same over many commits.

    Args:
        root: folder that holds the package.

    Returns:
        The checkout's commit, with ``-dirty`` if files in ``CODE`` were changed, or the one that
        pip installed from; null if neither is known.
    """
    if (root / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):  # no git, or the folder is another's
            head = _git(root, "rev-parse", "HEAD")
            changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *CODE)
            return f"{head}-dirty" if changed else head
        return None
    with suppress(PackageNotFoundError):
        origin = json.loads(distribution("fedpeft").read_text("direct_url.json") or "{}")
        return origin.get("vcs_info", {}).get("commit_id")
    return None


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return said.stdout.strip()
