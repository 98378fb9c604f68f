"""What a training script adds: optimizer, learning rate, callback, order of a corpus.

May import `adapter` and below, peft and transformers.
"""
