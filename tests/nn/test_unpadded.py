from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpeft.engine.cpu import OnCPU
from fedpeft.engine.stacked import Unsupported
from fedpeft.engine.unpadded import Unpadding
from tests.architectures import ARCHITECTURES, tiny

READERS = sorted(set(ARCHITECTURES) - {"vit", "siglip", "clip", "deberta"})
FIRST = ("bert", "distilbert", "roberta")
LENGTHS = (3, 6, 1)


def batch(model: nn.Module, left: bool = False) -> dict[str, Tensor]:
    """Three sequences of unequal lengths."""
    config: Any = model.config
    config.pad_token_id = config.pad_token_id or 0
    ids = torch.randint(3, 40, (len(LENGTHS), 6), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids.where(mask.bool(), config.pad_token_id), "attention_mask": mask}


def logits_and_gradients(model: nn.Module, given: dict[str, Tensor], way: Any) -> Tensor:
    """In one vector; a language model's logits where there are tokens."""
    torch.manual_seed(0)
    with OnCPU(), way:
        logits = model(**given).logits
    if logits.dim() == 3:
        logits = logits[given["attention_mask"].bool()]
    grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True)
    return torch.cat([logits.detach().flatten(), *(g.flatten() for g in grads if g is not None)])


@pytest.mark.parametrize(
    ("name", "parts", "left"),
    [
        (name, parts, left)
        for name in READERS
        for parts, left in ((1, False), (2, False), (2, True))
        if not (left and name in FIRST)  # their first token must not be padding
    ],
)
def test_same_logits_gradients_and_draws_without_the_padding(
    name: str, parts: int, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpeft.engine.unpadded.SPARED", 54 if parts == 2 else 55)
    model = tiny(name).train()
    rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    assert name.startswith("llama") or max(rates) > 0  # Llama drops nothing
    given, seen = batch(model, left), []
    expected = logits_and_gradients(model, given, nullcontext())
    block = model.get_submodule(ARCHITECTURES[name].block.format(i=1))
    linear = block.get_submodule(ARCHITECTURES[name].mlp)
    hook = linear.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape[:2])))
    way: Any = Unpadding(model).of(given, always=True)
    assert [part.shape for part in way.parts] == ([(3, 6)] if parts == 1 else [(1, 6), (2, 3)])
    found = logits_and_gradients(model, given, way)
    hook.remove()
    assert seen == [(1, sum(LENGTHS))]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    again = logits_and_gradients(model, given, nullcontext())  # nothing stays
    assert torch.equal(again, expected)


def test_only_where_it_pays() -> None:
    way = Unpadding(tiny("bert"))

    def active(lengths: list[int], longest: int) -> bool:
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        return not isinstance(way.of({"attention_mask": mask.long()}), nullcontext)

    assert active([40, 40, 40, 20], 40) is False  # 160 for 140
    assert active([40, 40, 20, 20], 40) is True  # 160 for 120
    assert active([8, 2, 2, 2], 8) is False  # few to spare, though most are padding
    assert isinstance(way.of({"pixels": torch.zeros(2, 3)}, always=True), nullcontext)


def test_a_failed_pass_leaves_the_model_as_it_was() -> None:
    model = tiny("bert").train()
    given = batch(model)
    expected = logits_and_gradients(model, given, nullcontext())
    with pytest.raises(ValueError, match="midway"), Unpadding(model).of(given, always=True):
        raise ValueError("midway")
    assert torch.equal(logits_and_gradients(model, given, nullcontext()), expected)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(Unsupported, match="0 lists of blocks"):
        Unpadding(nn.Sequential(nn.Linear(2, 2)))
