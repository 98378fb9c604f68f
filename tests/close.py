"""One tolerance table and one comparison for all tests."""

from torch import Tensor

# relative root-mean-square error allowed against the oracle
TOLERANCE = {
    # the same sums in another order, in fp64
    "fp64": 1e-12,
    # gradients through several layers in fp64; what is promised to users is 1e-10
    "fp64 gradient": 1e-11,
    # the same tokens in another batch, or experts in another order: routers compute in fp32 even in an fp64 model, and
    # their matrix products round differently with another shape
    "fp64 across batches": 1e-6,
    # the same sums in another order, in fp32
    "fp32": 1e-5,
    # another device multiplies in another order, and softmax and rsqrt differ in their last bits
    "fp32 across devices": 1e-3,
    # one rounding to 8 bits of mantissa per operation, in another order
    "bf16": 0.02,
    # torch's own Muon runs Newton-Schulz in bf16, ours in fp32 on a CPU: five iterations of 8-bit mantissas
    "bf16 orthogonalization": 0.05,
    # a sketch of 64 x 64 random directions, averaged over all nodes of a model
    "sketch": 0.2,
    # Fisher's direction with a ridge of 1e-3 of the mean variance against least squares without, on features whose
    # covariance has a condition of a few tens: the ridge turns it by about 1e-3 times that
    "fisher ridge": 0.02,
    # a linear system set up from sums in fp32 (1e-7), of a condition up to some hundreds
    "fp32 solve": 1e-4,
    # the same where the ridge of 1e-3 is all that is there in some directions, or sums of squares cancel: 1e-7 of sums
    # that are 400 times what is left of them, times a condition of some thousands
    "fp32 ill-conditioned solve": 0.02,
    # what the directions of a sketch of 24 columns hold of a spectrum that falls by 0.7 from one to the next, against
    # what the best ones hold: Nystrom's error is in what lies beyond the sketch
    "sketched directions": 0.03,
    # estimates from thousands of simulated texts: standard errors are under 0.03 of the values
    "statistics": 0.12,
}


def assert_close(name: str, got: Tensor, want: Tensor, kind: str) -> None:
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not got.numel():
        return
    got, want = got.double(), want.double()
    scale = want.square().mean().sqrt()
    error = float((got - want).square().mean().sqrt() / scale) if scale > 0 else float(got.abs().max())
    assert error <= TOLERANCE[kind], f"{name}: relative error {error:.3g}, allowed {TOLERANCE[kind]} ({kind})"


def assert_all_close(got: dict[str, Tensor], want: dict[str, Tensor], kind: str) -> None:
    assert got.keys() == want.keys()
    for name in got:
        assert_close(name, got[name], want[name], kind)
