"""Rounds of growth: measure, decide, grow, train, look again, until nothing is left to gain. Above all other rooms."""
