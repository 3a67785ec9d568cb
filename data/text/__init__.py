"""Text: a source of documents, its preparation, and the rows that a model trains on."""
