"""The grids that weights are rounded to, one file per kind; `grid.Grid` is what they have in common."""
