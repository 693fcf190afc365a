"""The README's example of a method is real: it runs, as printed."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedpeft.config import load
from fedpeft.methods.base import Role

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def rolora() -> Iterator[ModuleType]:
    """The README's Python block as the module that it says it is."""
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    module = ModuleType("fedpeft.methods.rolora")
    sys.modules[module.__name__] = module
    exec(compile(block.group(1), "README.md", "exec"), module.__dict__)
    yield module
    del sys.modules[module.__name__]


def test_example_alternates_and_aggregates_exactly(rolora: ModuleType, run: Any) -> None:
    fields = ["method=lora", "method.rank=4", "method._target_=fedpeft.methods.rolora.RoLoRA"]
    method = load(fields).method
    assert type(method) is rolora.RoLoRA
    a, b = "x.lora_A.default.weight", "x.lora_B.default.weight"
    assert [method.role(a, t) for t in (1, 2)] == [Role.FROZEN, Role.SHARED]
    assert [method.role(b, t) for t in (1, 2)] == [Role.SHARED, Role.FROZEN]
    summary = run(*fields)
    assert summary["refused"] == {}
    assert all(value < 1e-5 for value in summary["interference"])


def test_commands_of_the_readme_exist() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    used = set(re.findall(r"^fedpeft (\w+)", "\n".join(blocks), re.MULTILINE))
    assert used == {"run", "compare", "params", "partition"}
    targets = set(re.findall(r"^make (\w+)", "\n".join(blocks), re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"quickstart", "test"}
    assert all(re.search(rf"^{t}:", makefile, re.MULTILINE) for t in targets)
    for overrides in re.findall(r"^fedpeft run ([^-#\n]*)", "\n".join(blocks), re.MULTILINE):
        load(overrides.split())


def test_yaml_of_the_readme_is_like_the_others() -> None:
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert block is not None
    own = (ROOT / "conf/method/lora.yaml").read_text()
    keys = re.findall(r"^ *([\w]+):", block.group(1), re.MULTILINE)
    assert keys == ["lr", "method", "_target_", "rank", "alpha"]
    assert set(keys) <= set(re.findall(r"^ *([\w]+):", own, re.MULTILINE))
