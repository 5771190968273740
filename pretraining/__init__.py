"""A training run: schedules, networks, state, logging, and what it does when something fails."""
