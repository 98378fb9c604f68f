"""From a map and a budget to the nodes, and parts of nodes, that grow.

May import `maps` and below.
"""
