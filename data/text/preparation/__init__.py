"""From files or TFDS to shards of token ids, and reading them back."""
