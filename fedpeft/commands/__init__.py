"""Commands, except node, server and deploy, which ``deployment`` holds; for ``cli.py`` alone."""
