"""Watches the size of every tensor that torch makes, so that a test can bound memory without measuring it."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """While open, the most entries of any tensor that an operation returned."""

    n_entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.itemsize
            for leaf in tree_leaves(result)
            if isinstance(leaf, torch.Tensor)
        ]
        self.n_entries = max([self.n_entries, *sizes])
        return result
