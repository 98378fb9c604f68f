"""Measure where a model errs: batches, the error map, its verdict, its pictures.

May import `packed` and below.
"""
