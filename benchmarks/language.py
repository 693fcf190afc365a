"""Time steps of a language model against a plain transformers loop, at equal loss.

    python -m benchmarks.language FOLDER_OF_MEDQUAD [--steps 8] [--batch 8] [--tokens 160]
                                 [--repeats 3]

SmolLM2-135M-Instruct with LoRA of rank 8 on query, key and value learns MedQuAD's answers. All
sides start from the same values and take the same rows with the same optimizer, on two threads.

- plain_fp32, plain_bf16: ``AutoModelForCausalLM`` with HF PEFT's model around it, rows in any
  order, padded to the batch's longest; the loss is the model's own, with -100 on prompts and
  padding. In bfloat16, under autocast.
- fedpeft_fp32, fedpeft_bf16: one client's round, with batches of rows of like length.

Each side's model after the steps is measured on the same validation rows in float32. At last the
untrained model answers test rows in bfloat16.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.measure import interleaved, medians, ratio, save, spread
from fedpeft.config.load import load_config
from fedpeft.data.batching import Batch, training_batches
from fedpeft.engine.engine import Engine, Result
from fedpeft.engine.plan import Job
from fedpeft.seeding import generator
from fedpeft.state import State

LR = 1e-3
ANSWERS, NEW_TOKENS = 100, 96  # rows that are answered, and the most tokens of an answer
PREFIX = "base_model.model."  # HF PEFT's before the names of the model's parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder of MedQuAD")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=160, help="of a question and its answer")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    engines = {precision: _engine(args, precision) for precision in ("fp32", "bf16")}
    exact = engines["fp32"]
    model = _plain_model(exact)
    after: dict[str, State] = {}

    def ours(precision: str) -> float:
        result = _client(engines[precision])
        after[f"fedpeft_{precision}"] = result.after
        return result.seconds

    def plain(precision: str) -> float:
        seconds, after[f"plain_{precision}"] = _plain(model, exact, precision == "bf16")
        return seconds

    sides: dict[str, Callable[[], float]] = {
        f"{name}_{precision}": (lambda side=side, precision=precision: side(precision))
        for precision in ("fp32", "bf16")
        for name, side in (("plain", plain), ("fedpeft", ours))
    }
    timings = interleaved(sides, args.repeats)
    pairs = [(f"plain_{p}", f"fedpeft_{q}") for p in ("fp32", "bf16") for q in ("fp32", "bf16")]
    result = {
        "steps": args.steps,
        "batch_size": args.batch,
        "tokens": args.tokens,
        "seconds_a_step": medians({n: [s / args.steps for s in t] for n, t in timings.items()}),
        "range_of_seconds": {name: spread(values) for name, values in timings.items()},
        "ratios": {f"{a} / {b}": ratio(timings[a], timings[b]) for a, b in pairs},
        "validation_loss": {name: _loss(exact, state) for name, state in after.items()},
    }
    result["validation_loss"]["before"] = _loss(exact, exact.replica.initial)
    result["answers"] = _answers(args)
    save("language", result)


def _engine(args: argparse.Namespace, precision: str, *more: str) -> Engine:
    size = [f"local_steps={args.steps}", f"batch_size={args.batch}", f"lr={LR}"]
    data = ["data=medquad", f"data.path='{args.data.resolve()}'", "data.max_validation_rows=32"]
    data += [f"data.max_length={args.tokens}", *more]
    lora = ["method=lora", "method.rank=8", "method.targets=[q,k,v]"]
    run = ["model=smollm2", "num_clients=1", "partition=iid", "runtime=inprocess"]
    return Engine(
        load_config([*run, *data, *lora, *size, "runtime.threads=2", f"precision={precision}"])
    )


def _answers(args: argparse.Namespace) -> dict[str, float]:
    """Answer test rows, and return the seconds and the counts."""
    room = [f"data.max_length={2 * NEW_TOKENS}", f"data.max_answer_length={NEW_TOKENS}"]
    engine = _engine(
        args, "bf16", *room, f"data.max_test_rows={ANSWERS}", "evaluation.batch_size=32"
    )
    engine.replica.load(engine.replica.initial)
    rows, seconds = engine.rows.examples("test"), []
    engine.evaluate(rows)  # warms up
    for last in (False, True):  # only the last evaluation generates
        begun = time.perf_counter()
        engine.evaluate(rows, last=last)
        seconds.append(time.perf_counter() - begun)
    words = [len(sample["generated"].split()) for sample in engine.samples]
    return {
        "rows": len(words),
        "most_new_tokens": NEW_TOKENS,
        "mean_words": round(sum(words) / len(words), 1),
        "seconds": round(seconds[1] - seconds[0], 1),
    }


def _client(engine: Engine) -> Result:
    """Train the client through a round."""
    return engine.train_client(Job(engine.replica.roles.at(1, 0), engine.replica.initial))


def _loss(engine: Engine, state: State) -> float:
    engine.replica.load(state)
    return round(engine.evaluate(engine.rows.examples("validation"))["loss"], 4)


def _plain_model(engine: Engine) -> nn.Module:
    """Return the model with adapters as HF PEFT makes them."""
    method: Any = engine.config.method
    base = AutoModelForCausalLM.from_pretrained(
        engine.config.model.source(), dtype=torch.float32, local_files_only=True
    )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=["q_proj", "k_proj", "v_proj"],
    )
    return get_peft_model(base, config)


def _plain(model: nn.Module, engine: Engine, halves: bool) -> tuple[float, State]:
    """Train by the usual loop; return its seconds and what it trained, by the model's names.

    Args:
        model: the model that ``_plain_model`` returned.
        engine: gives the rows and the values to start from.
        halves: true for bfloat16 autocast.
    """
    parameters = {n.removeprefix(PREFIX): p for n, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == engine.replica.initial.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(engine.replica.initial[name])
    batches = _any_order(engine)
    begun = time.perf_counter()
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0)
    model.train()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=halves):
            loss = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                labels=batch["labels"],
            ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begun
    return seconds, {name: p.detach().clone() for name, p in parameters.items()}


def _any_order(engine: Engine) -> list[Batch]:
    """Return batches of the client's rows of round 1 in the order of the draw, with labels."""
    examples, config = engine.rows.training(0)[0], engine.config
    draws = generator(config.seed, "batches", 1, 0)
    chosen = training_batches(
        examples.lengths, config.batch_size, config.local_steps, None, draws, bucket=False
    )
    batches = [examples.batch(rows) for rows in chosen]
    for batch in batches:
        ids = batch["input_ids"]
        place = torch.arange(ids.shape[1])
        ignored = (batch["attention_mask"] == 0) | (place < batch["prompts"][:, None])
        batch["labels"] = ids.masked_fill(ignored, -100)
    return batches


if __name__ == "__main__":
    main()
