"""The configuration: composed by Hydra, typed and checked."""
