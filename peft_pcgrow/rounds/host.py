"""What rounds of growth need of transformers that is not documented."""

# where `enable_input_require_grads` keeps its hooks, and until it is undone only
INPUT_HOOKS = ("_require_grads_hooks", "_require_grads_hook")
