"""Facts of a process that ``fedpeft check`` compares: versions, a hash, counts and sizes alone."""

import platform
from importlib.metadata import version
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from fedpeft.data.rows.source import SPLITS
from fedpeft.engine.cpu import cores
from fedpeft.engine.engine import Engine
from fedpeft.models.pretrained import Pretrained
from fedpeft.versions import SHOWN

TEXTS = ("python", *SHOWN, "weights")
CGROUP = Path("/sys/fs/cgroup")
NUMBERS = ("cpus", "used_bytes", "free_bytes", "gpu_free_bytes", "gpu_bytes")

_hashes: WeakKeyDictionary[Engine, str] = WeakKeyDictionary()  # virtual clients share an engine


def facts(engine: Engine) -> dict[str, str | int]:
    """Return the facts of this process with an engine in it.

    Returns:
        ``TEXTS``: versions, and the SHA-256 of the weights, ``random``, or ``unknown`` where no
        safetensors files are on this machine. ``NUMBERS``: cores; bytes that this process has in
        memory, those that are free, and the same of the GPU that it uses, 0 where unknown.
    """
    free, whole = _gpu(engine.replica.device)
    if engine not in _hashes:
        _hashes[engine] = _weights(engine.config.model)
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in SHOWN},
        "weights": _hashes[engine],
        "cpus": cores(),
        "used_bytes": _kilobytes("/proc/self/status", "VmRSS") * 1024,
        "free_bytes": free_memory(),
        "gpu_free_bytes": free,
        "gpu_bytes": whole,
    }


def rows_by_split(engine: Engine, client: int) -> dict[str, int]:
    """Count a client's rows by split.

    Raises:
        ValueError: the client has too few rows.
    """
    rows = engine.rows.client_examples(client)
    return {split: len(rows[split]) for split in SPLITS}


def _weights(model: Pretrained) -> str:
    if model.random:
        return "random"
    return model.weights_sha256() or "unknown"


def free_memory(cgroup: Path = CGROUP) -> int:
    """Return the bytes that processes may still take: the machine's, or fewer in a container.

    Args:
        cgroup: folder in which Linux says what this container may take.
    """
    machine = _kilobytes("/proc/meminfo", "MemAvailable") * 1024
    most, used = (_number(cgroup / f"memory.{name}") for name in ("max", "current"))
    return machine if most is None or used is None else min(machine, max(0, most - used))


def _gpu(device: torch.device) -> tuple[int, int]:
    """Return free and all bytes of a GPU; 0 for the CPU."""
    return torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)


def _kilobytes(file: str, name: str) -> int:
    """Return a number of one of Linux's tables; 0 on other systems."""
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    numbers = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(numbers[0]) if numbers else 0


def _number(file: Path) -> int | None:
    """Return the number in a file; null if there is no file, or a word such as ``max``."""
    text = file.read_text().strip() if file.exists() else ""
    return int(text) if text.isdigit() else None
