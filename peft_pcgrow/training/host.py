"""What training needs of torch that its documentation calls beta, or does not promise."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode  # sees all operations, on meta too
from torch.utils._pytree import tree_map as each_in  # over the tensors in whatever operations and layers return

# operations on lists of tensors
foreach_add_ = torch._foreach_add_  # type: ignore
foreach_lerp_ = torch._foreach_lerp_  # type: ignore
foreach_mul_ = torch._foreach_mul_  # type: ignore
# where a parameter keeps who waits for its gradient
WAITING = "_post_accumulate_grad_hooks"
# what bool(), int() and item() come to
ASKS_FOR_A_NUMBER = torch.ops.aten._local_scalar_dense.default


def memory_of(tensor: Tensor) -> int:
    """What tells one tensor's memory from that of others, as long as it lives; on the meta device nothing has an
    address."""
    return tensor.untyped_storage()._cdata
