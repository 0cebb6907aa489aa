"""Models: named shapes, random weights, safe loading, and the lint that reads them before a run."""
