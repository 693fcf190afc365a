"""Kinds of task, which say what a model learns from rows and what is measured."""
