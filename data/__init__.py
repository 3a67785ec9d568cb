"""Data sets: recall tasks made on the device (`synthetics/`) and text (`text/`), as configs that return batches."""
