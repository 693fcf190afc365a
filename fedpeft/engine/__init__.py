"""How training steps and evaluations are computed; every trick on torch stands here."""
