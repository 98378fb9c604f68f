"""All that knows PEFT: the config, the layer, the model, what a step may do, what is saved.

May import `locate` and below, and peft.
"""
