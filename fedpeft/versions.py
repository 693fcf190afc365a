"""The packages whose versions a run saves, shows and compares."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

SHOWN = ("fedpeft", "flwr", "torch", "transformers")  # where there is room for few
# They decide a run's numbers.
DECIDING = (*SHOWN, "flwr-datasets", "peft", "datasets", "ray", "numpy")


def installed() -> dict[str, str]:
    """Return the versions of Python and of the packages in ``DECIDING`` that are installed."""
    versions = {"python": platform.python_version()}
    for name in DECIDING:
        with suppress(PackageNotFoundError):  # a run in one process does without ray
            versions[name] = version(name)
    return versions
