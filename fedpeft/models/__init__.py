"""Base models, their tokenizers, and where methods attach to them."""
