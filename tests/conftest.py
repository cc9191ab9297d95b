"""Its place here puts `tests/` on the import path, for `recipe_weights` and the other helpers."""
