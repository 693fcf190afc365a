"""Virtual tokens: trained vectors that a text model reads before its tokens or in its attention."""

from typing import Any

import torch
from torch import Tensor, nn

# Functions import transformers, because it takes seconds.

# Ends of the names of learned positions: BERT's, GPT-2's, OPT's, the first GPT's.
POSITIONS = ("position_embeddings", "wpe", "embed_positions", "positions_embed")


class PromptedEmbedding(nn.Module):
    """An embedding whose ids from V on are the virtual tokens 0, 1, ... of ``prompt``.

    Args:
        embedding: has a vocabulary of V.
        prompt: maps the numbers 0..n-1, (n,), to vectors (n, d), as HF PEFT's prompt encoders do.
        num_tokens: n.
    """

    def __init__(self, embedding: nn.Embedding, prompt: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.embedding, self.prompt = embedding, prompt
        self.vocabulary, self.num_tokens = embedding.num_embeddings, num_tokens

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (B, L) to vectors (B, L, d)."""
        virtual = ids >= self.vocabulary
        text = self.embedding(ids.masked_fill(virtual, 0))
        vectors = self.prompt(torch.arange(self.num_tokens, device=ids.device))
        chosen = nn.functional.embedding((ids - self.vocabulary).clamp(min=0), vectors)
        return torch.where(virtual.unsqueeze(-1), chosen.to(text.dtype), text)


class _Around(nn.Module):
    """Base of wrappers around a model, with the attributes that transformers reads."""

    base_model_prefix = "inner"

    def __init__(self, model: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.inner: Any = model
        self.num_tokens = num_tokens
        self.limit = position_limit(model)

    @property
    def config(self) -> Any:
        """Configuration of the inner model."""
        return self.inner.config

    @property
    def device(self) -> torch.device:
        """Device of the inner model."""
        return next(self.inner.parameters()).device

    @property
    def generation_config(self) -> Any:
        """Generation settings of the inner model."""
        return self.inner.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.inner.generation_config = value

    def _before(self, tokens: Tensor, values: Tensor) -> Tensor:
        """Put values (n,) before every row of tokens (B, L)."""
        return torch.cat([values.expand(len(tokens), -1).to(tokens.dtype), tokens], dim=1)

    def _check_length(self, ids: Tensor) -> None:
        if self.limit is not None and ids.shape[1] + self.num_tokens > self.limit:
            raise ValueError(
                f"{type(self.inner).__name__} has {self.limit} positions, too few for "
                f"{self.num_tokens} virtual tokens and {ids.shape[1]} of a text: set "
                f"data.max_length to at most {self.limit - self.num_tokens}"
            )

    def _mask(self, mask: Tensor) -> Tensor:
        """Return a mask (B, n + L) by which every text attends to all virtual tokens."""
        return self._before(mask, mask.new_ones(self.num_tokens))


class Prompted(_Around):
    """A model that reads virtual tokens before every text; they take up positions.

    The model gets ids, because a decoder that classifies looks for its last token among them; HF
    PEFT's wrapper passes vectors, so such a decoder reads padding. Logits are the text's alone.

    Args:
        model: a transformers model that reads text; its input embedding is replaced.
        prompt: maps the numbers 0..n-1, (n,), to vectors (n, d).
        num_tokens: n.
    """

    def __init__(self, model: Any, prompt: nn.Module, num_tokens: int) -> None:
        super().__init__(model, num_tokens)
        owner = getattr(model, "backbone", model)  # in a mean-pooled classifier
        owner.set_input_embeddings(
            PromptedEmbedding(owner.get_input_embeddings(), prompt, num_tokens)
        )

    def _ids(self, ids: Tensor) -> Tensor:
        self._check_length(ids)
        first = self.inner_embedding.vocabulary
        return self._before(ids, torch.arange(first, first + self.num_tokens, device=ids.device))

    @property
    def vectors(self) -> Tensor:
        """Vectors of the virtual tokens, (n, d)."""
        return self.inner_embedding.prompt(torch.arange(self.num_tokens, device=self.device))

    @property
    def inner_embedding(self) -> PromptedEmbedding:
        """Embedding of the inner model, which knows the virtual tokens."""
        return getattr(self.inner, "backbone", self.inner).get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Map token ids and mask, both (B, L), to logits (B, labels) or (B, L, V)."""
        output = self.inner(
            input_ids=self._ids(input_ids), attention_mask=self._mask(attention_mask)
        )
        if output.logits.dim() == 3:
            output.logits = output.logits[:, self.num_tokens :]
        return output

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
        """Return the ids (B, L) and those that the model adds, as transformers' ``generate`` does.

        A repetition penalty counts the new tokens alone.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L).
            settings: passed to ``generate``.
        """
        new = self.inner.generate(
            inputs_embeds=self.inner_embedding(self._ids(input_ids)),
            attention_mask=self._mask(attention_mask),
            **settings,
        )
        return torch.cat([input_ids.repeat_interleave(len(new) // len(input_ids), 0), new], dim=1)


class Prefixed(_Around):
    """A model whose every attention layer sees n trained keys and values before the text's own.

    The model gets them as a filled cache. A text's positions begin at n, as with HF PEFT.

    Args:
        model: a transformers model that takes ``past_key_values``.
        prefix: maps the numbers 0..n-1, (n,), to (n, 2 * layers * kv_heads * head_dim), as PEFT's
            ``PrefixEncoder`` does.
        num_tokens: n.
        heads: number of key and value heads.
        head_dim: width of a head.
    """

    def __init__(
        self, model: nn.Module, prefix: nn.Module, num_tokens: int, heads: int, head_dim: int
    ) -> None:
        super().__init__(model, num_tokens)
        self.prefix = prefix
        self.heads, self.head_dim = heads, head_dim

    @property
    def vectors(self) -> Tensor:
        """Keys and values, (n, 2 * layers * kv_heads * head_dim)."""
        return self.prefix(torch.arange(self.num_tokens, device=self.device))

    def _cache(self, rows: int) -> Any:
        from transformers import DynamicCache

        vectors = self.vectors.view(self.num_tokens, -1, 2, self.heads, self.head_dim)
        vectors = vectors.permute(1, 2, 3, 0, 4).to(self._dtype())  # (layers, 2, heads, n, dim)
        cache = DynamicCache()
        for layer, (key, value) in enumerate(vectors):
            cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
        return cache

    def _dtype(self) -> torch.dtype:
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return next(p.dtype for p in self.inner.parameters() if p.is_floating_point())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Map token ids and mask, both (B, L), to logits (B, labels) or (B, L, V)."""
        self._check_length(input_ids)
        return self.inner(
            input_ids=input_ids,
            attention_mask=self._mask(attention_mask),
            past_key_values=self._cache(len(input_ids)),
        )

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
        """Return the ids (B, L) and those that the model adds, as transformers' ``generate`` does.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L).
            settings: passed to ``generate``.
        """
        # transformers counts the ids of what is cached and does not read them, so zeros do.
        ids = self._before(input_ids, input_ids.new_zeros(self.num_tokens))
        generated = self.inner.generate(
            input_ids=ids,
            attention_mask=self._mask(attention_mask),
            past_key_values=self._cache(len(ids) * self._copies(**settings)),
            **settings,
        )
        return generated[:, self.num_tokens :]

    def _copies(self, generation_config: Any = None, **_: Any) -> int:
        """Return how many rows ``generate`` makes of each, because it does not copy the cache."""
        config = generation_config or self.generation_config
        return max(config.num_beams or 1, config.num_return_sequences or 1)


def position_limit(model: nn.Module) -> int | None:
    """Return how many tokens a model can read; null if its positions are not learned."""
    for name, module in model.named_modules():
        if name.endswith(POSITIONS) and isinstance(module, nn.Embedding):
            # RoBERTa's positions start after that of padding, and OPT's at an offset.
            start = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - getattr(module, "offset", start)
    return None


def text_limit(model: nn.Module) -> int | None:
    """Return how many tokens of a text a model can read beside its virtual tokens, or null."""
    limit = position_limit(model)
    return None if limit is None else limit - getattr(model, "num_tokens", 0)
