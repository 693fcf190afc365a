"""Kinds of task: what a model learns from rows, and what is measured."""
