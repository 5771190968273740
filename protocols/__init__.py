"""Evaluation of frozen features: the protocols' computations, their figures, and the pages that show them."""
