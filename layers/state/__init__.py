"""What a mixer keeps while it decodes: key-value caches, states of convolutions."""
