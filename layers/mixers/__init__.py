"""One mechanism per file: config, module, equation. `recollect.layers` exports them."""
