"""Where FLUX computes, which is not where its parts rest while they are offloaded."""

from typing import Any

import torch
from torch import nn


def execution_device(pipe: Any) -> torch.device:
    """The device on which a pipeline computes: SAEs, batch sizes and recipes follow it.

    `pipe.device` and a part's own device are the CPU (or meta) while parts are offloaded; diffusers says where they
    run by this private name alone.
    """
    return torch.device(pipe._execution_device)


def is_offloaded(pipe: Any) -> bool:
    """Whether parts of a pipeline rest elsewhere (in main memory, on disk) and come to where it computes in turn."""
    kind = execution_device(pipe).type
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return any(parameter.device.type != kind for part in parts for parameter in part.parameters())
