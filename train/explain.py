"""Says why a feature fires: which words of the prompt and which earlier features drive it, at one step.

    python -m train.explain --prompt "a large red star on a black background" --feature 1

Effects are shares of the feature's drive, measured by taking each word or feature away for that one step.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fluxsae.flux.hookpoints import HookPoint
from fluxsae.sae.config import Mismatch
from train.command import start
from train.outputs import check_file_path

if TYPE_CHECKING:
    from fluxsae.steering.attribution import Explanation


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Which feature, in which image, at which step."""

    prompt: str
    """What the image shows."""
    feature: int
    """Number of the feature that is explained."""
    seed: int = 0
    """Seed of the image."""
    step: int | None = None
    """Step that is explained, 0-based; left out, the earliest of the noise levels the SAE was trained on."""
    row: int | None = None
    """With --column: explain the feature at this patch, 0-based from the top; left out, over the whole image."""
    column: int | None = None
    """0-based from the left."""
    limit: int = 8
    """Earlier features that are tried."""
    run: Path | None = None
    """Run folder with the SAEs; left out, the embedded miniature's."""
    hookpoint: str | None = None
    """Hook point of the feature; left out, the last of the run."""
    flux: str | None = None
    """FLUX to load, a name, folder or Hub repository; left out, the run's own."""
    allow_mismatch: tuple[Mismatch, ...] = ()
    """What may differ from what the SAEs were trained on, by name."""
    device: str | None = None
    """cuda, mps or cpu; left out, the best that is there."""
    out: Path | None = None
    """JSON file to write the explanation into."""


def main(config: ExplainConfig) -> "Explanation":
    """Prints the words and features by effect; writes them where asked."""
    from fluxsae.errors import FluxSaeError
    from fluxsae.files import write_json
    from fluxsae.flux import execution_device, token_grid
    from fluxsae.miniature import miniature_path
    from fluxsae.runs.folder import RunFolder
    from fluxsae.sae.model import SparseAutoencoder
    from fluxsae.steering.attribution import Target, explain
    from train.flux_options import open_flux

    if config.out is not None:
        check_file_path(config.out)
    if (config.row is None) != (config.column is None):
        raise FluxSaeError("--row and --column name one patch together; give both or neither.")
    run = RunFolder(config.run or miniature_path("run"))
    info = run.load_info()
    hookpoint = run.check_sae(config.hookpoint or run.default_sae())
    pipe = open_flux(config.flux, info.flux_id, info.flux_revision, device=config.device)
    device = execution_device(pipe)
    names: list[HookPoint] = [name for name in run.sae_names() if run.has_sae(name)]
    saes = {name: SparseAutoencoder.from_pretrained(run.sae_path(name), device=device) for name in names}
    ground = saes[hookpoint].config.trained_on
    step = min(ground.steps) if config.step is None and ground is not None else config.step or 0
    token = None
    if config.row is not None and config.column is not None:
        grid = token_grid(pipe, info.settings)
        if not (0 <= config.row < grid.rows and 0 <= config.column < grid.cols):
            raise FluxSaeError(
                f"--row {config.row} --column {config.column}: rows are 0 to {grid.rows - 1}, columns 0 to "
                f"{grid.cols - 1}."
            )
        token = config.row * grid.cols + config.column
    found = explain(
        pipe,
        saes,
        Target(hookpoint, config.feature, step, token),
        prompt=config.prompt,
        seed=config.seed,
        settings=info.settings,
        limit=config.limit,
        allow_mismatch=config.allow_mismatch,
    )
    if config.out is not None:
        write_json(config.out, found.to_dict())
    print(_table(found, {str(name): run.load_features(name) for name in names}))
    return found


def _table(found: "Explanation", names: dict[str, object]) -> str:
    values = found.to_dict()
    lines = [
        f"feature {values['feature']} at {values['hookpoint']}, step {values['step']} (sigma {values['sigma']:.2f}): "
        f"drive {values['drive']:.2f}",
        f"without any word at this step: {_share(values['without_prompt'], values['drive'])} is left",
        "",
        "word             share of the drive",
    ]
    lines += [f"{each['word']:<16} {each['share']:>+6.0%}" for each in values["words"]]
    lines += ["", "earlier feature                                share of the drive"]
    for each in values["features"]:
        label = names[each["hookpoint"]][each["feature"]].label or "no name"  # type: ignore[index]
        lines.append(
            f"{each['hookpoint'] + ' ' + str(each['feature']) + ' (' + label + ')':<46} {each['share']:>+6.1%}"
        )
    lines += [
        f"{each['hookpoint']}: all features {_share(each['features'], values['drive'])}, "
        f"not reconstructed by its SAE {_share(each['not_reconstructed'], values['drive'])} (predicted)"
        for each in values["hookpoints"]
    ]
    return "\n".join(lines)


def _share(effect: float, drive: float) -> str:
    return f"{effect / drive:+.1%}" if drive else json.dumps(effect)


if __name__ == "__main__":
    start(main, ExplainConfig, __doc__)
