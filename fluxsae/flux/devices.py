"""Where FLUX computes, which is not where its parts rest while they are offloaded."""

from typing import Any

import torch


def execution_device(pipe: Any) -> torch.device:
    """The device on which a pipeline computes: SAEs, batch sizes and recipes follow it.

    `pipe.device` and a part's own device are the CPU (or meta) while parts are offloaded; diffusers says where they
    run by this private name alone.
    """
    return torch.device(pipe._execution_device)
