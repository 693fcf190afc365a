"""Base models, their tokenizers, and the modules that methods attach to."""
