"""The README's example of a method runs as printed; its commands, YAML and tables are right."""

import re
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedpeft.config.load import load_config
from fedpeft.engine.roles import Roles
from fedpeft.methods.base import At
from fedpeft.state import TRAINED, Role

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NAME = "fedpeft.methods.settling_lora"


@pytest.fixture
def example() -> Iterator[ModuleType]:
    """The README's Python block, imported as the module that the README calls it."""
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
    method = load_config(fields).method
    assert type(method) is example.SettlingLoRA
    a, b = "x.lora_A.default.weight", "x.lora_B.default.weight"
    assert [method.role(a, At(t)) for t in (1, 2, 3)] == [Role.SHARED, Role.FROZEN, Role.FROZEN]
    assert [method.role(b, At(t)) for t in (1, 2, 3)] == [Role.SHARED] * 3
    with pytest.raises(ValueError, match="settled_after must be >= 0, got -1"):
        example.SettlingLoRA(settled_after=-1)
    summary = run(*fields)
    assert summary["refused"] == {}
    first, second = summary["interference"]
    assert second < 1e-5 < first


def test_commands_of_the_readme_exist() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    used = set(re.findall(r"^fedpeft (\w+)", "\n".join(blocks), re.MULTILINE))
    assert used == {"run", "compare", "study", "show", "params", "partition", "check", "deploy"}
    targets = set(re.findall(r"^make (\w+)", "\n".join(blocks), re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"quickstart", "test"}
    assert all(re.search(rf"^{t}:", makefile, re.MULTILINE) for t in targets)
    for overrides in re.findall(r"^fedpeft run ([^-#\n]*)", "\n".join(blocks), re.MULTILINE):
        load_config(shlex.split(overrides))


def test_yaml_of_the_readme_is_like_the_others() -> None:
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert block is not None
    lora = (ROOT / "conf/method/lora.yaml").read_text()
    keys = re.findall(r"^ *([\w]+):", block.group(1), re.MULTILINE)
    assert keys == ["lr", "method", "_target_", "rank", "alpha", "settled_after"]
    assert set(keys[:-1]) <= set(re.findall(r"^ *([\w]+):", lora, re.MULTILINE))
    assert f"_target_: {NAME}.SettlingLoRA\n" in block.group(1)


# --- its tables ----------------------------------------------------------------------------------


def table(text: str, first: str) -> dict[str, list[str]]:
    """Return a table's cells by the first cell of each row.

    Args:
        text: of the document.
        first: begins the table's heading.
    """
    body = text[text.index(first) :].partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body]
    return {name.strip("`"): cells for name, *cells in rows[2:]}


def test_its_first_table_is_the_quickstart_s() -> None:
    saved = table((ROOT / "results/quickstart/comparison.md").read_text(), "| method | quality")
    shown = table(README, "| method | quality")
    assert list(shown) == list(saved)
    for name, (quality, test, start, _, _, trained, up, down, total, _) in saved.items():
        assert shown[name] == [quality, test, start, trained, up, down, total]


PARTS = {  # words of the table of roles: patterns of BERT's parameters, in round 1
    "A": r"lora_A",
    "B": r"lora_B",
    "C": r"\.compress$",
    "W2'": r"\.project$",
    "head": r"^classifier\.",
    "all TT factors and biases": r"factor_|(adapter\.(down|up)|pooler\.dense)\.bias$",
    "first, last and one middle factor of each TT": r"factor_[13]_of_|factor_(\d)_of_\1$",
    "the other factors": r"factor_([24]_of_5|[245]_of_6)$",
    "TT biases": r"(adapter\.(down|up)|pooler\.dense)\.bias$",
}
ROLES = table(README, "| method | shared |")
COLUMNS = (Role.SHARED, Role.PERSONAL, Role.FROZEN)


@pytest.mark.parametrize("method", ROLES)
def test_its_roles_are_the_method_s(method: str) -> None:
    config = load_config(["model=bert_base", "data=sst2", f"method={method}"])
    task = config.data
    model = config.method.inject(config.model.build_meta(task.auto_class, task.num_labels))
    roles = Roles(config, model).by_name(1)
    role = {name: roles.get(name, Role.FROZEN) for name, _ in model.named_parameters()}
    covered: set[str] = set()
    for cell, expected in zip(ROLES[method], COLUMNS, strict=True):
        for word in re.split(r", (?!last)", cell) if cell else ():
            names = {name for name in role if re.search(PARTS[word], name)}
            assert {role[name] for name in names} == {expected}, word
            covered |= names
    assert {name for name in role if role[name] in TRAINED} <= covered
