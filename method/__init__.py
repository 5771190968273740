"""Parts of the method, one per file: colour operations, optimizers, the rank of features."""
