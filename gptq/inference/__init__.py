"""A packed layer multiplies, and a model of packed layers loads."""
