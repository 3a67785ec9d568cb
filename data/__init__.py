"""Recall tasks (`synthetics/`) and text (`text.py`): configs that give batches to training and evaluation."""
