"""Trained models in formats that other programs read, and reading them back."""

from recollect.export.safetensors_format import export_safetensors, load_safetensors, read_manifest

__all__ = ["export_safetensors", "load_safetensors", "read_manifest"]
