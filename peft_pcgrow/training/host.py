"""What training needs of torch that its documentation does not promise, or calls beta: work on lists of tensors."""

import torch

foreach_add_ = torch._foreach_add_  # type: ignore
foreach_lerp_ = torch._foreach_lerp_  # type: ignore
foreach_mul_ = torch._foreach_mul_  # type: ignore
# where a parameter keeps who waits for its gradient
WAITING = "_post_accumulate_grad_hooks"
