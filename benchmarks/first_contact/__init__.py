"""Ten minutes on a GPU that is lent rarely: every kernel checked, timed and compared, with results that cannot be
lost."""
