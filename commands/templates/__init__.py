"""The files that `recollect new` writes: NewMixer, new_mixer and the like stand for the names that it is given."""
