"""Training steps and evaluations; every trick on torch stands here."""
