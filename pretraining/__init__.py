"""A training run: its plan, networks and state; what it logs; how it survives."""
