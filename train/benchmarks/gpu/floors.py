"""Physical floors: the operations and bytes that a piece of work cannot do without, and the time they take at least."""

from dataclasses import dataclass

from train.benchmarks.gpu.models import Scale


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches at best, measured: operations and bytes a second."""

    bf16: float
    """Matrix products in bfloat16, operations a second."""
    fp32: float
    """Matrix products in float32, operations a second."""
    memory: float
    """Bytes a second of a copy, read and written ones counted."""


def block_operations(scale: Scale, n_tokens: int) -> float:
    """Operations of one block, double or single: 24 C^2 N in its matrices and 4 N^2 C in attention."""
    return 24 * scale.d_model**2 * n_tokens + 4 * n_tokens**2 * scale.d_model


def step_operations(scale: Scale, *, n_text: int, n_image: int) -> float:
    """Operations of one denoising step of one image, embeddings and modulation left out (below 1 %)."""
    return scale.n_blocks * block_operations(scale, n_text + n_image)


def encode_operations(n_tokens: int, d_model: int, n_features: int) -> float:
    """Operations of an SAE's pre-activations."""
    return 2 * n_tokens * d_model * n_features


def training_operations(n_tokens: int, d_model: int, n_features: int) -> float:
    """Operations of a dense training step: encode, decode, gradients of acts and of both weights, 2CF a token each."""
    return 10 * n_tokens * d_model * n_features


def optimiser_bytes(d_model: int, n_features: int) -> float:
    """Bytes that Adam moves in fp32: weights and both moments read and written, gradients read; two matrices."""
    return 2 * d_model * n_features * 4 * 7


def early_exit_share(scale: Scale, *, step: int, block: int) -> float:
    """The share of a full generation's blocks that run when it ends after a double-stream block at a step."""
    return (step + (block + 1) / scale.n_blocks) / scale.settings.num_inference_steps


def sweep_share(n_strengths: int, *, first_step: int, n_steps: int) -> float:
    """Steps of a baseline and `n_strengths` edits with the first steps shared, as a share of those of separate runs."""
    separate = (n_strengths + 1) * n_steps
    return (first_step + (n_strengths + 1) * (n_steps - first_step)) / separate
