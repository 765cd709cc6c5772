"""One file with everything a stopped training continues from, and the log of metrics beside it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.files import explained_full_disk, load_tensors, read_header, save_tensors, write_text
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.training.config import TrainConfig

CHECKPOINT_NAME = "checkpoint.safetensors"
LOG_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class Plan:
    """What is trained on what: a checkpoint continues only under the plan it was made with."""

    saes: dict[str, SaeConfig]
    config: TrainConfig
    n_batches: int
    """Batches of an epoch."""
    batch_size: int
    """Tokens of a batch over all processes."""
    data_order: str
    """The source's `order`."""

    @property
    def n_steps(self) -> int:
        """Batches of the whole run."""
        return self.config.n_steps(self.n_batches)

    def to_json(self) -> str:
        """The plan as text."""
        saes = {name: config.to_dict() for name, config in self.saes.items()}
        return json.dumps({**asdict(self), "saes": saes}, sort_keys=True)

    def differences(self, other: "Plan") -> list[str]:
        """Names of what differs and decides the weights."""
        names = [f"SAE {name}" for name in {**self.saes, **other.saes} if self.saes.get(name) != other.saes.get(name)]
        names += [n for n in ("n_batches", "batch_size", "data_order") if getattr(self, n) != getattr(other, n)]
        return names + self.config.changed(other.config)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote."""
        values = json.loads(text)
        saes = {name: SaeConfig.from_dict(config) for name, config in values["saes"].items()}
        return cls(**{**values, "saes": saes, "config": TrainConfig(**values["config"])})


def save_checkpoint(folder: Path, plan: Plan, step: int, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes the checkpoint of a step, whole or not at all."""
    tensors = {f"{name}/{key}": tensor for name, state in states.items() for key, tensor in state.items()}
    save_tensors(folder / CHECKPOINT_NAME, tensors, metadata={"step": str(step), "plan": plan.to_json()})


def load_checkpoint(folder: Path, plan: Plan) -> tuple[int, dict[str, dict[str, Tensor]]] | None:
    """The step and the states to continue from, or None where there is no checkpoint.

    Raises:
        FluxSaeError: it is damaged, or belongs to another plan.
    """
    path = folder / CHECKPOINT_NAME
    if not path.is_file():
        return None
    metadata = read_header(path).metadata
    try:
        made_with, step = Plan.from_json(metadata["plan"]), int(metadata["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise FluxSaeError(f"{path} is no checkpoint of this version ({error}). Delete it to start anew.") from error
    differences = plan.differences(made_with)
    if differences:
        raise FluxSaeError(
            f"{path} was made with other settings ({', '.join(differences)} differ). "
            "Train with those to continue it, or delete it (--force) to start anew."
        )
    states: dict[str, dict[str, Tensor]] = {name: {} for name in plan.saes}
    for name, tensor in load_tensors(path).items():
        sae, _, key = name.partition("/")
        states.setdefault(sae, {})[key] = tensor
    return step, states


class MetricsLog:
    """JSON lines, one a log interval and SAE; continued from a step as if nothing had come after it."""

    def __init__(self, path: Path | None, *, step: int) -> None:
        self._path = path
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        write_text(path, "".join(line for line in lines if _is_before(line, step)))

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one line; numbers that are not finite become null."""
        if self._path is not None:
            with explained_full_disk(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({key: _plain(value) for key, value in line.items()}) + "\n")


def _is_before(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False  # a line that was cut off when the process was killed


def _plain(value: Any) -> Any:
    is_number = isinstance(value, float)
    return None if is_number and not torch.isfinite(torch.tensor(value)) else value
