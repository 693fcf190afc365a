"""A site's policy: what a server may set there.

The site composes its own configuration, and then the server's with its own on top. Wherever the
two differ the server has set something, and the policy must name it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from fedpeft.config.compose import CONF, composed, leaves
from fedpeft.config.message import INTERPOLATION, of_message
from fedpeft.config.overrides import join, key_of
from fedpeft.config.schema import ConfigError
from fedpeft.errors import PartlyPublic

# Nothing of the model, and of the data only sizes, because the other keys name paths, columns,
# templates and labels of the site.
ALLOW = (
    *("method.*", "strategy.*", "compression.*", "optimizer.*", "evaluation.*", "runtime.*"),
    *("partition._target_", "partition.alpha", "partition.min_size"),
    *("partition.classes_per_client", "data.max_*", "seed", "num_clients", "num_rounds"),
    *("clients_per_round", "local_steps", "local_epochs", "lr", "batch_size", "accumulate"),
    *("personal", "frozen", "layers", "bucketing", "precision"),
)
LIMITS = {
    "method.*": 1_000_000,
    "method.*rank*": 4096,
    "num_clients": 100_000,
    "num_rounds": 10_000,
    "local_steps": 10_000,
    "local_epochs": 100,
    "batch_size": 4096,
    "accumulate": 4096,
    "runtime.clients_per_pass": 64,
    "data.max_length": 8192,
    "evaluation.batch_size": 4096,
    "evaluation.max_tokens": 1 << 20,
    "runtime.threads": 64,
}


@dataclass(frozen=True)
class Policy:
    """Checks the configuration that a server sends.

    Args:
        configuration: the site's own overrides; they win over the server's.
        allow: shell patterns of the keys that a server may set.
        limits: largest value by shell pattern of keys.
    """

    configuration: Sequence[str] = ()
    allow: Sequence[str] = ALLOW
    limits: Mapping[str, float] = field(default_factory=lambda: LIMITS)

    def __post_init__(self) -> None:
        for key in ("configuration", "allow"):
            value = getattr(self, key)
            if isinstance(value, str) or not all(isinstance(v, str) for v in value):
                raise ValueError(f"{key} of a policy must be a list of texts, got {value}")
        if held := [o for o in self.configuration if INTERPOLATION in o]:
            raise ValueError(f"a site's own configuration must hold no interpolation: {held[0]}")
        for key, most in self.limits.items():
            if isinstance(most, bool) or not isinstance(most, int | float):
                raise ValueError(f"limits.{key} of a policy must be a number, got {most}")

    @classmethod
    def read(cls, path: str | Path) -> "Policy":
        """Return the policy of a YAML file; a key that it leaves out keeps its default.

        Raises:
            ValueError: the file is no YAML, or has another key or a value of a wrong type.
        """
        try:
            values: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"the policy {path} cannot be read: {error}") from error
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or (values.keys() - set(names)):
            raise ValueError(f"the policy {path} must have no other keys than {', '.join(names)}")
        limits = values.get("limits", {})
        if not isinstance(limits, dict):
            raise ValueError(f"limits of a policy must be a number for each key, got {limits}")
        values["limits"] = LIMITS | limits
        return cls(**values)

    def save(self, path: Path) -> None:
        """Write the policy as YAML."""
        path.write_text(
            yaml.safe_dump({f.name: _plain(getattr(self, f.name)) for f in fields(self)})
        )

    def merged(self, overrides: str) -> str:
        """Return a server's overrides with the site's own in their place.

        Raises:
            ValueError: the server sets what the policy does not name, or too large a value.
        """
        site = tuple(self.configuration)
        asked = tuple(o for o in of_message(overrides) if not self._is_own(key_of(o)))
        whole = (*asked, *site)
        before, after = _values(site), _with_own(asked, site)
        for key in sorted(before.keys() | after.keys()):
            if key in before and key in after and before[key] == after[key]:
                continue
            if not any(fnmatchcase(key, pattern) for pattern in self.allow):
                raise ValueError(f"this site's policy does not let a server set {key}")
            self._check(key, after.get(key))
        return join(whole)

    def _is_own(self, key: str) -> bool:
        """Tell whether the site sets a key, or one above it, or chooses the group of this name.

        A server's key below a value of the site would replace that value, or fail with it.
        """
        own = {key_of(override) for override in self.configuration}
        values = {name for name in own if not (CONF / name).is_dir()}
        name = key.partition("@")[0]
        return key in own or name in own or any(name.startswith(f"{v}.") for v in values)

    def _check(self, key: str, value: Any) -> None:
        """Refuse a number that is too large, also one in a list or in quotes."""
        if isinstance(value, list):
            for part in value:
                self._check(key, part)
            return
        for pattern, most in self.limits.items():
            if fnmatchcase(key, pattern) and _number(value) > most:
                raise ValueError(f"this site's policy limits {key} to {most}, got {value!r:.30}")


def _number(value: Any) -> float:
    """Return the number that the typed configuration makes of a value; -inf if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return -math.inf


def _with_own(asked: tuple[str, ...], own: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of a server's overrides with the site's on top.

    Raises:
        ConfigError: the server's overrides alone fail to compose; the error names none of the
            site's.
        PartlyPublic: the server's overrides cannot be composed with the site's.
    """
    try:
        return _values((*asked, *own))
    except ConfigError as error:
        _values(asked)
        keys = ", ".join(sorted({key_of(override) for override in asked}))
        raise PartlyPublic(
            f"this site's configuration cannot be composed with what the server sets: {keys}",
            f": {error}",
        ) from error


@lru_cache(maxsize=8)
def _values(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of a configuration by their full keys."""
    return leaves(composed(overrides), resolve=False)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value)
