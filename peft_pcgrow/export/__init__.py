"""Grown models as plain checkpoints.

May import `training` and below, peft and transformers.
"""
