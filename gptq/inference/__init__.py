"""Load a model with packed layers, and multiply by packed weights."""
