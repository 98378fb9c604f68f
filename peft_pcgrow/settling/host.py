"""What settling needs of torch, transformers and PEFT that their documentation does not promise.

Such names stand in files called `host` and nowhere else, each with why it is needed; rooms above have files of their
own. `tests/test_host_torch.py` and its like say which of them an upgrade took away.
"""

from torch import Tensor
from torch._C import _current_graph_task_id as backward_under_way  # tells errors of two backwards apart
from torch._C import _functions
from torch._C import _is_cached_tensor as replayed  # type: ignore # an output of a CUDA graph, which writes uncounted
from torch._C import _set_grad_enabled as set_grad_enabled  # one call into C, which no interrupt can fall into
from torch._C._autograd import _get_current_graph_task_keep_graph as keeps_graph  # whether a backward may come again
from torch._C._autograd import _top_saved_tensors_default_hooks as saving_hooks  # whether somebody checkpoints
from torch.autograd import Function, forward_ad
from torch.nn.modules.batchnorm import _NormBase as Normalization  # its buffers are statistics, written by forwards
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX as EXTRA_STATE  # what state dicts call extra state
from torch.utils.checkpoint import get_device_states, set_device_states  # random states of devices
from transformers.utils import output_capturing
from transformers.utils.output_capturing import _active_collector as collector  # the lists that a call records into

# the node that a move to another device or dtype leaves in a graph
Moved: type = _functions.ToCopyBackward0  # type: ignore[attr-defined]
# where modules keep their tensors
HOLDERS = ("_parameters", "_buffers")
# read and written on modules as they are
MODULE = (
    *HOLDERS,
    "_modules",  # children, to put them back in their order
    "_non_persistent_buffers_set",  # a copy of a module shares it with the module
    "_forward_hooks",  # what else runs at a call
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",  # has an entry for each of those that take them
    "_load_from_state_dict",  # overridden, to know who loads
    "_apply",  # overridden, to look before a cast
)
# and on tensors
TENSOR = (
    "_version",  # counts writes
    "_backward_hooks",  # whether somebody watches its gradient
)
# by these names, modules hold what they wrap without a trace in what it computes: FSDP, checkpointing, compilers
WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
# hooks of this module may come with any call that wants something recorded
ONLOOKERS = output_capturing.__name__
# where transformers' configs keep how attention and experts are run
ATTENTION, EXPERTS = "_attn_implementation", "_experts_implementation"
# where PEFT's layers keep what they are set to
ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


def times_written(tensor: Tensor) -> int:
    """How often a tensor was written to, unless through `.data`; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def in_backward() -> bool:
    """Whether this thread is in the midst of a backward."""
    return backward_under_way() >= 0


def in_forward_mode() -> bool:
    """Whether derivatives are being taken by forward mode."""
    return forward_ad._current_level >= 0


def node_of(function: type[Function]) -> type:
    """The class of the nodes that a function leaves in a graph."""
    return function._backward_cls  # type: ignore[attr-defined]
