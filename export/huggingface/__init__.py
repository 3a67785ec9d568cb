"""Models as folders that the transformers library loads, and such folders as models here.

    config.json, generation_config.json, README.md   what it is, how it generates, where it comes from
    model.safetensors                                or several files and an index
    tokenizer.json, tokenizer_config.json            of a text model

Layouts: one module each in layouts/.
"""

from recollect.export.huggingface.folder import export_huggingface, import_huggingface, is_huggingface
from recollect.export.huggingface.model_card import Facts

__all__ = ["Facts", "export_huggingface", "import_huggingface", "is_huggingface"]
