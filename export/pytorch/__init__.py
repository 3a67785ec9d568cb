"""Mixers in plain PyTorch, from which `export --code` assembles a modelling file. Nothing here is imported."""
