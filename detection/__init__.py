"""Open-set detection with Grounding DINO (arXiv 2303.05499), whose networks are those of the transformers library."""
