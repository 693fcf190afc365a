"""The README's example of a method is real: it runs, as printed."""

import re
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedpeft.config import load
from fedpeft.methods.base import Role

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


NAME = "fedpeft.methods.settling_lora"


@pytest.fixture
def example() -> Iterator[ModuleType]:
    """The README's Python block as the module that it says it is."""
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    module = ModuleType(NAME)
    sys.modules[NAME] = module
    exec(compile(block.group(1), "README.md", "exec"), module.__dict__)
    yield module
    del sys.modules[NAME]


def test_the_example_is_no_method_of_the_tree() -> None:
    assert find_spec(NAME) is None
    assert f"`{NAME.replace('.', '/')}.py`" in README


def test_example_settles_and_aggregates_exactly_from_there_on(
    example: ModuleType, run: Any
) -> None:
    fields = ["method=lora", "method.rank=4", f"method._target_={NAME}.SettlingLoRA"]
    fields += ["+method.settled_after=1"]
    method = load(fields).method
    assert type(method) is example.SettlingLoRA
    a, b = "x.lora_A.default.weight", "x.lora_B.default.weight"
    assert [method.role(a, t) for t in (1, 2, 3)] == [Role.SHARED, Role.FROZEN, Role.FROZEN]
    assert [method.role(b, t) for t in (1, 2, 3)] == [Role.SHARED] * 3
    with pytest.raises(ValueError, match="settled_after must be >= 0, got -1"):
        example.SettlingLoRA(settled_after=-1)
    summary = run(*fields)
    assert summary["refused"] == {}
    first, second = summary["interference"]
    assert second < 1e-5 < first


def test_commands_of_the_readme_exist() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    used = set(re.findall(r"^fedpeft (\w+)", "\n".join(blocks), re.MULTILINE))
    assert used == {"run", "compare", "params", "partition"}
    targets = set(re.findall(r"^make (\w+)", "\n".join(blocks), re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"quickstart", "test"}
    assert all(re.search(rf"^{t}:", makefile, re.MULTILINE) for t in targets)
    for overrides in re.findall(r"^fedpeft run ([^-#\n]*)", "\n".join(blocks), re.MULTILINE):
        load(shlex.split(overrides))


def test_yaml_of_the_readme_is_like_the_others() -> None:
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert block is not None
    own = (ROOT / "conf/method/lora.yaml").read_text()
    keys = re.findall(r"^ *([\w]+):", block.group(1), re.MULTILINE)
    assert keys == ["lr", "method", "_target_", "rank", "alpha", "settled_after"]
    assert set(keys[:-1]) <= set(re.findall(r"^ *([\w]+):", own, re.MULTILINE))
    assert f"_target_: {NAME}.SettlingLoRA\n" in block.group(1)
