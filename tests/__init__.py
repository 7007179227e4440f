"""A regular package, so that no other project's stray `tests` folder can stand in for it."""
