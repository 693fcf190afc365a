"""A tiny decoder with a tokenizer of whole words."""

from pathlib import Path

import pytest
import torch

from tests.conftest import COMMON, TOPICS
from tests.data.stand_ins import tokenizer_of_words

PLAIN = "### Instruction: Response: . , ? because so"


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of hidden size 32, two layers, with random weights and without a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    words = " ".join([*TOPICS.values(), COMMON, PLAIN]).split()
    tokenizer = tokenizer_of_words(*words)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
