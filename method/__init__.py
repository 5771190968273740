"""What the methods are made of, one noun a file: colour operations, optimizers, the rank of features."""
