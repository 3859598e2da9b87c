"""The built-in world: shapes on a plain background, with a judge that knows the truth."""
