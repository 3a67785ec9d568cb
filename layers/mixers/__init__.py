"""One mechanism per file: config, module, equation."""
