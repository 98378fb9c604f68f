"""How errors are carried: layers run one by one, and the error at each is handed down.

May import the ground (`peft_pcgrow/*.py`), torch and, in `inner_outputs`, transformers.
"""
