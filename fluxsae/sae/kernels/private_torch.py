"""What torch offers only under a private name or a process-wide switch. Each has a plain way beside it, the reference.

`tests/sae/test_kernels.py` notices when a torch release takes one away; training then goes on with the plain way.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

PAIRS_AT_ONCE = 1 << 14
"""Pairs whose two rows the plain way gathers together."""


def has_pair_products() -> bool:
    """Whether this torch has the operation behind `pair_products`."""
    return hasattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward")


def has_bfloat16_switch() -> bool:
    """Whether this torch has the switch behind `bfloat16_product`."""
    return hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision")


def pair_products(
    left: Float[Tensor, "n_left d_model"],
    left_rows: Int[Tensor, " pairs"],
    right: Float[Tensor, "n_right d_model"],
    right_rows: Int[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """<left[left_rows[p]], right[right_rows[p]]> for each pair, as the gradient of `embedding_bag`'s weights."""
    if not has_pair_products():
        return plain_pair_products(left, left_rows, right, right_rows)
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, right_rows, left_rows, left_rows, 0, -1
    )  # mode 0 is a sum, -1 is no padding
    return products


def plain_pair_products(
    left: Float[Tensor, "n_left d_model"],
    left_rows: Int[Tensor, " pairs"],
    right: Float[Tensor, "n_right d_model"],
    right_rows: Int[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """`pair_products` by gathering both rows of some pairs at a time."""
    pairs = zip(left_rows.split(PAIRS_AT_ONCE), right_rows.split(PAIRS_AT_ONCE), strict=True)
    return torch.cat([torch.linalg.vecdot(left[first], right[second]) for first, second in pairs])


def bfloat16_product(a: Float[Tensor, "m n"], b: Float[Tensor, "n p"]) -> Float[Tensor, "m p"]:
    """a @ b of float32 factors on a CPU, multiplied in bfloat16; the sums are float32 and are not rounded."""
    if not has_bfloat16_switch():
        return a.bfloat16().float() @ b.bfloat16().float()
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    previous, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        return a @ b
    finally:
        matmul.fp32_precision = previous
