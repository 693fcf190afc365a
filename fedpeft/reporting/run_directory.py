"""A run's directory: the resolved configuration, a line a round, and the summary."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

PACKAGES = ("fedpeft", "flwr", "flwr-datasets", "torch", "transformers", "peft", "ray", "numpy")


class RunDirectory:
    """Writes each file as soon as it is known, so that a killed run leaves complete lines.

    Args:
        path: the directory; null for ``runs/<time>_<label>``.
        config: the resolved configuration.
        label: ends the name of the default directory.

    Raises:
        ValueError: the directory holds a run.
    """

    def __init__(self, path: str | None, config: DictConfig, label: str) -> None:
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        # Not resolved, so that shared files do not name folders of this machine.
        self.path = Path(path or f"runs/{stamp}_{label}")
        self.path.mkdir(parents=True, exist_ok=True)
        self._metrics = self.path / "metrics.jsonl"
        if self._metrics.exists():
            raise ValueError(f"run_dir={self.path} already holds a run: give another")
        self._write("config.yaml", OmegaConf.to_yaml(config, resolve=True))

    def append(self, line: Mapping[str, Any]) -> None:
        """Append a round's line; it is on the disk when this returns."""
        with self._metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save_samples(self, samples: Sequence[Mapping[str, str]], most: int = 100) -> None:
        """Write ``samples.jsonl``: at most ``most`` generated texts beside their references."""
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples[:most]]
        (self.path / "samples.jsonl").write_text("".join(lines))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, atomically."""
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        draft = self.path / f".{name}.part"
        draft.write_text(text)
        draft.replace(self.path / name)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that decide the numbers."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # a run in one process does without ray
            installed[name] = version(name)
    return installed


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return a run's lines, without a last one that was cut off."""
    lines = (path / "metrics.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
