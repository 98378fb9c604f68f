"""What training needs of torch that its documentation calls beta: operations on lists of tensors."""

import torch

foreach_add_ = torch._foreach_add_  # type: ignore
foreach_lerp_ = torch._foreach_lerp_  # type: ignore
foreach_mul_ = torch._foreach_mul_  # type: ignore
