"""A trained run -> a scorer behind HTTP, in the terminal and on a page, and the proof that its scores are the run's."""
