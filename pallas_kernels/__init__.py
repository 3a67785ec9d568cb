"""Operations on arrays, each a folder with a front door, a naive reference, and faster forms. Knows nothing of Flax
or configs."""
