"""Which tokens a newborn takes: scores, thresholds, where texts begin, directions that retain text needs.

May import `architectures` and below.
"""
