"""How documents become rows of tokens: packed, chunked, decomposed, with a curriculum."""
