"""Ready candidates: one module for each package of others, each with the package's own name."""
