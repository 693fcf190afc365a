"""Losses of next tokens without the logits of all tokens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from fedpeft.data.batching import Batch
from fedpeft.data.tasks.instruction import InstructionTuning
from fedpeft.data.tasks.language import LanguageModelling
from fedpeft.models.heads import parted
from fedpeft.nn import token_loss
from fedpeft.nn.virtual import Prompted

VOCABULARY = 40
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
}
DRY_BERT = {"is_decoder": True, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
LINEAR = {  # their logits are a linear map of the last vectors
    "llama": SMALL | {"tie_word_embeddings": True},
    "qwen2": SMALL,
    "gemma": SMALL,
    "gpt2": GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": SMALL,
    "phi": SMALL,  # a head with a bias
    "bert": SMALL | DRY_BERT,
}
MORE = {  # they cap or scale their logits
    "gemma2": SMALL | {"final_logit_softcapping": 1.0},
    "cohere": SMALL | {"logit_scale": 0.3, "eos_token_id": 2},
    "granite": SMALL | {"logits_scaling": 3.0},
}


def model_of(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **((LINEAR | MORE)[kind] | more))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # so large that a cap is felt
                parameter.normal_(0, 0.5)
    return model.train()


def batch_of(seed: int = 0) -> Batch:
    """Return three rows of 12, 9 and 5 tokens, whose prompts have 4, 6 and 2."""
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([12, 9, 5])
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(1, VOCABULARY, (3, 12), generator=draws) * mask
    row = torch.arange(3)
    prompts = torch.tensor([4, 6, 2])
    return {"row": row, "input_ids": ids, "attention_mask": mask, "prompts": prompts}


ANSWERS = 8 + 3 + 3  # tokens


def by_all_logits(model: nn.Module, batch: Batch, from_prompts: bool) -> tuple[Tensor, Tensor]:
    """Return the loss in the usual way, and the most likely tokens at predicted places."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses, likely = [], []
    for row in range(len(logits)):
        first = int(batch["prompts"][row]) if from_prompts else 1
        for place in range(first, int(batch["attention_mask"][row].sum())):
            target = batch["input_ids"][row, place]
            losses.append(F.cross_entropy(logits[row, place - 1], target))
            likely.append(logits[row, place - 1].argmax())
    return torch.stack(losses).mean(), torch.stack(likely)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "ROOM", {"cpu": 4 * VOCABULARY * 5})  # five tokens


def assert_equal(model: Any, task: Any, batch: Batch) -> None:
    """Check the loss, all gradients and the predictions against those by all logits."""
    from_prompts = not isinstance(task, LanguageModelling) and task.loss_on == "answer"
    expected, likely = by_all_logits(model, batch, from_prompts)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    right = torch.autograd.grad(expected, list(trained.values()))
    outputs = task.forward(model, batch)
    loss = task.loss(outputs, batch)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in right)
    for name, ours, theirs in zip(
        trained, torch.autograd.grad(loss, list(trained.values())), right, strict=True
    ):
        assert float((ours - theirs).abs().max()) <= 2e-6 * largest, name
    with torch.inference_mode():
        measures = task.evaluate_batch(task.forward(model, batch), batch)
    count = int(measures["count"].sum())
    assert float(measures["loss"].sum()) / count == pytest.approx(
        float(by_all_logits(model, batch, isinstance(task, InstructionTuning))[0].detach()),
        rel=1e-5,
    )
    if "predicted" in measures and from_prompts:
        predicted = measures["predicted"]
        assert predicted[predicted != -100].tolist() == likely.tolist() and count == ANSWERS


def freeze_head(model: Any) -> None:
    """Freeze what the head holds, and with it a tied embedding."""
    for parameter in model.get_output_embeddings().parameters():
        parameter.requires_grad_(False)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("kind", [*LINEAR, *MORE])
def test_losses_and_gradients_are_those_of_all_logits(kind: str, trains: bool) -> None:
    model = model_of(kind)
    if not trains:
        freeze_head(model)
    assert_equal(model, InstructionTuning(label=None), batch_of())
    assert (parted(model) is None) == (kind in MORE)
    modes = {module.training for module in model.modules()}
    assert modes == {True}  # the test of the head left the model as it was


@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_losses_on_prompts_too(loss_on: str) -> None:
    assert_equal(model_of("llama"), InstructionTuning(label=None, loss_on=loss_on), batch_of())


def test_language_modelling_is_that_of_all_logits() -> None:
    batch = {key: value for key, value in batch_of().items() if key != "prompts"}
    batch["prompts"] = torch.ones(3).long()  # read by the test alone, as the first token
    assert_equal(model_of("llama"), LanguageModelling(), batch)


def test_an_adapter_at_the_head() -> None:
    model = model_of("llama", tie_word_embeddings=False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head", "q_proj"]), model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        "model",
        "lm_head",
    }
    assert_equal(model, InstructionTuning(label=None), batch_of())


def test_dropout_at_the_head_draws_once() -> None:
    """Its logits are kept for the backward pass, because a second draw would be another."""
    model = model_of("llama", tie_word_embeddings=False)
    config = LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5)
    inject_adapter_in_model(config, model)
    (b,) = [p for n, p in model.named_parameters() if "lora_B" in n]
    nn.init.normal_(b)
    task, batch = InstructionTuning(label=None), batch_of()

    def loss(moved: float) -> float:
        b.data[0, 0] += moved
        torch.manual_seed(1)
        value = task.loss(task.forward(model, batch), batch)
        b.data[0, 0] -= moved
        return float(value.detach())

    torch.manual_seed(1)
    task.loss(task.forward(model, batch), batch).backward()
    assert b.grad is not None
    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    assert slope == pytest.approx(float(b.grad[0, 0]), rel=1e-2)


def test_virtual_tokens_are_not_predicted() -> None:
    model = model_of("llama")
    freeze_head(model)
    prompt = nn.Embedding(3, 16)
    assert_equal(Prompted(model, prompt, 3), InstructionTuning(label=None), batch_of())


class Counted(nn.Linear):
    """A head that notes how many tokens it reads at once."""

    def forward(self, input: Tensor) -> Tensor:
        self.read = [*getattr(self, "read", []), input.numel() // input.shape[-1]]
        return super().forward(input)


@pytest.mark.parametrize(
    ("trains", "reads"),
    # A head that trains reads columns of all rows, from the first answer's on, and in the backward
    # pass again.
    [(False, [5, 5, 4]), (True, [3] * 10 + [3] * 10)],
)
def test_few_logits_are_held_at_once(trains: bool, reads: list[int]) -> None:
    """The largest tensor kept for the backward pass has no vocabulary as its width."""
    model = model_of("llama", tie_word_embeddings=False, vocab_size=VOCABULARY)
    head = Counted(16, VOCABULARY, bias=False).requires_grad_(trains)
    model.lm_head = head
    task, batch = InstructionTuning(label=None), batch_of()
    task.forward(model, batch)  # tests the head
    head.read, kept = [], []
    with saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        loss = task.loss(task.forward(model, batch), batch)
    loss.backward()
    assert sorted(head.read) == sorted(reads)
    weight = (16, VOCABULARY)
    assert not [shape for shape in kept if shape[-1:] == (VOCABULARY,) and shape != weight]


def test_autocast_rounds_no_more_than_with_all_logits() -> None:
    model = model_of("llama", tie_word_embeddings=False)
    freeze_head(model)
    task, batch = InstructionTuning(label=None), batch_of()
    exact = float(by_all_logits(model, batch, True)[0].detach())
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        plain = float(by_all_logits(model, batch, True)[0].detach())
        loss = task.loss(task.forward(model, batch), batch)
    loss.backward()
    assert abs(float(loss.detach()) - exact) <= 2 * abs(plain - exact) + 1e-2 * exact
