"""All that is known of transformers' models: where their experts are, and what an expert's weights are.

May import `settling` and below, and transformers.
"""
