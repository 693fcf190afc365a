"""The commands of the command line but for deployment's; only ``cli.py`` imports them."""
