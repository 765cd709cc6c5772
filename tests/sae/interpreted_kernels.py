"""Runs every Triton kernel's check in Triton's interpreter, on a CPU; prints {"kernel type width": agrees} as JSON.

Start it in a process of its own with TRITON_INTERPRET=1: the kernels are interpreted or compiled as they are imported.
"""

import json
from typing import Any

import torch
from triton.runtime import interpreter

from fluxsae.sae.kernels.agreement import CHECKS

CASES = [
    ("topk", torch.float32, 49_152), ("topk", torch.bfloat16, 1000), ("topk_acts", torch.float32, 1000),
    ("topk_acts", torch.bfloat16, 49_152), ("bag_sums", torch.float32, 600), ("bag_sums", torch.bfloat16, 40),
    ("pair_products", torch.float32, 300), ("pair_products", torch.bfloat16, 40), ("adam_", torch.float32, 300),
]  # fmt: skip


def read_bounds_of_loops() -> None:
    """Lets `range` take a number of a kernel: Triton 3.6 asks numpy for it in a way that numpy 2.4 has ended."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: number.handle.data.item())

    interpreter._patch_lang_tensor = patched


read_bounds_of_loops()
print(
    json.dumps(
        {f"{name} {dtype} {width}": CHECKS[name](torch.device("cpu"), dtype, width) for name, dtype, width in CASES}
    )
)
