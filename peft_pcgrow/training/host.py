"""What training needs of torch that its documentation calls beta: operations on lists of tensors."""

from torch import _foreach_add_ as foreach_add_
from torch import _foreach_lerp_ as foreach_lerp_
from torch import _foreach_mul_ as foreach_mul_

__all__ = ["foreach_add_", "foreach_lerp_", "foreach_mul_"]
