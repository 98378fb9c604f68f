"""Experts whose weights take few bits, and their checkpoints.

May import `gates` and below, and transformers.
"""
