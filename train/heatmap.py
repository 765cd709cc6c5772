"""Makes one image and shows where one feature fires in it.

python -m train.heatmap --prompt "a red star on a black background" --feature 1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image, ImageDraw

from fluxsae.errors import FluxSaeError
from fluxsae.flux.settings import GenerationSettings
from fluxsae.miniature import miniature_path
from train.command import start
from train.outputs import check_png_path

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fluxsae.features.cards import CardIndex
    from fluxsae.flux import AnyFlux, Captured
    from fluxsae.sae.model import SparseAutoencoder


@dataclass(frozen=True, kw_only=True)
class HeatmapConfig:
    """Which image, which feature, and how it looks."""

    prompt: str
    """What the image shows."""
    feature: int | None = None
    """Number of the feature; left out, the one that fires most, relative to its maximum over the run."""
    run: Path | None = None
    """Run folder with the SAE; left out, the embedded miniature's."""
    hookpoint: str | None = None
    """Hook point; left out, the last of the run."""
    seed: int = 0
    """Seed of the image."""
    step: int | None = None
    """Step whose activations are shown, 0-based; left out, the highest over the steps the SAE was trained on."""
    num_inference_steps: int | None = None
    """Denoising steps; left out, the run's own number."""
    scale: Literal["feature", "image"] = "feature"
    """feature: fractions of the feature's maximum over the run; image: of this image's maximum."""
    opacity: float = 0.8
    """Of the overlay, 0 to 1."""
    threshold: float = 0.05
    """Fraction of the scale below which no heat is shown, 0 to 1."""
    smooth: bool = True
    """Interpolate between tokens; --no-smooth shows each token as one flat cell."""
    why: bool = False
    """Also take each word out of the prompt and report what is left of the feature."""
    out: Path = Path("heatmap.png")
    """The picture to write: image and overlay side by side, PNG."""
    flux: str | None = None
    """FLUX to load, a name, folder or Hub repository; left out, the run's own."""
    device: str | None = None
    """cuda, mps or cpu; left out, the best that is there."""


def main(config: HeatmapConfig) -> None:
    """Writes the picture and prints what fires."""
    from fluxsae.features.cards import CardIndex
    from fluxsae.flux import load_flux, token_grid
    from fluxsae.pictures.heatmaps import overlay, token_heatmap
    from fluxsae.runs.folder import RunFolder
    from fluxsae.sae.model import SparseAutoencoder

    check_png_path(config.out)
    run = RunFolder(config.run or miniature_path("run"))
    index = CardIndex(run, config.hookpoint or run.default_sae())
    if config.feature is not None:
        index.features[config.feature]  # refuses what does not exist, before any model work
    revision = index.info.flux_revision if config.flux is None else None
    pipe = load_flux(config.flux or index.info.flux_id, revision=revision, device=config.device)
    sae = SparseAutoencoder.from_pretrained(run.path, subfolder=run.sae_subfolder(index.hookpoint), device=pipe.device)
    reader = _Reader(pipe, sae, index, config)
    image, acts = reader.read(config.prompt)
    feature = config.feature if config.feature is not None else _strongest(acts, index)
    reference = index.features[feature].max_act if config.scale == "feature" else float(acts[:, feature].max())
    heatmap = token_heatmap(acts[:, feature].cpu(), token_grid(pipe, reader.settings), reference=reference)
    overlaid = overlay(
        image,
        heatmap,
        opacity=config.opacity,
        threshold=config.threshold,
        smooth=config.smooth,
        min_side=512,
    )
    title = f"feature {feature}: {index.labels[feature] or 'no label'}"
    sheet = _side_by_side(image, overlaid, title=title, maximum=reference, config=config)
    sheet.save(config.out)
    print(f"{title}, highest activation {float(acts[:, feature].max()):.3g} of {reference:.3g}, in {config.out}")
    if config.why:
        _print_why(reader.score_of(feature), config.prompt)


class _Reader:
    """Generates images and reads their activations at one hook point."""

    def __init__(self, pipe: AnyFlux, sae: SparseAutoencoder, index: CardIndex, config: HeatmapConfig) -> None:
        from fluxsae.features.scoring import check_trained_step, trained_steps
        from fluxsae.flux import schedule_sigmas, settings_ground

        self.pipe, self.sae, self.hookpoint, self.seed = pipe, sae, index.hookpoint, config.seed
        own = index.info.settings
        n_steps = config.num_inference_steps or own.num_inference_steps
        self.settings = GenerationSettings.from_dict({**own.to_dict(), "num_inference_steps": n_steps})
        sae.require_ground(settings_ground(pipe, self.settings, self.hookpoint))
        sigmas = schedule_sigmas(pipe, self.settings)
        self.steps = (
            trained_steps(sae, sigmas) if config.step is None else (check_trained_step(sae, config.step, sigmas),)
        )

    def read(self, prompt: str) -> tuple[Image.Image, Float[Tensor, "tokens features"]]:
        """The image, and every feature's highest activation over the steps on each of its tokens."""
        from fluxsae.flux import capture, generate

        with capture(self.pipe, [self.hookpoint], steps=self.steps) as captured:
            image = generate(self.pipe, prompt, seeds=self.seed, settings=self.settings)[0]
        assert isinstance(image, Image.Image)
        return image, self._acts(captured)[0]

    def score_of(self, feature: int) -> Callable[[Sequence[str]], list[float]]:
        """S of one feature for prompts at the reader's seed; generation ends after the last step that is read."""
        import torch

        from fluxsae.flux import capture, generate

        def score(prompts: Sequence[str]) -> list[float]:
            scores = []
            for prompt in prompts:
                with capture(self.pipe, [self.hookpoint], steps=self.steps, stop_early=True) as captured:
                    generate(self.pipe, prompt, seeds=self.seed, settings=self.settings)
                with torch.inference_mode():
                    acts = [
                        self.sae.encode_features(self._tokens(captured, s), [feature], sigma=captured.sigma(s))
                        for s in self.steps
                    ]
                scores.append(max(float(part.max()) for part in acts))
            return scores

        return score

    def _acts(self, captured: Captured) -> Float[Tensor, "images tokens features"]:
        import torch

        with torch.inference_mode():
            by_step = (self.sae.encode(self._tokens(captured, step), sigma=captured.sigma(step)) for step in self.steps)
            return reduce(torch.maximum, by_step)

    def _tokens(self, captured: Captured, step: int) -> Float[Tensor, "images tokens d_model"]:
        from fluxsae.flux.bad_numbers import check_finite

        tokens = captured.get(self.hookpoint, step)
        check_finite(tokens, ["this image"], hookpoint=self.hookpoint, step=step)
        return tokens


def _strongest(acts: Float[Tensor, "tokens features"], index: CardIndex) -> int:
    import torch

    maxima = torch.tensor(index.features.column("max_act"), dtype=torch.float32)
    relative = torch.where(maxima > 0, acts.amax(dim=0).float().cpu() / maxima.clamp(min=1e-12), 0.0)
    if float(relative.max()) <= 0:
        raise FluxSaeError("no feature of this hook point fires in this image; try another prompt or --feature")
    return int(relative.argmax())


def _side_by_side(
    image: Image.Image, overlaid: Image.Image, *, title: str, maximum: float, config: HeatmapConfig
) -> Image.Image:
    from fluxsae.pictures.heatmaps import enlarge, font, with_legend

    plain = enlarge(image, min_side=512)
    end = maximum if config.scale == "feature" else "this image's maximum"
    right = with_legend(overlaid, maximum=end, opacity=config.opacity, threshold=config.threshold)
    sheet = Image.new("RGB", (plain.width + right.width + 36, right.height + 84), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    pen.text((12, 12), title, fill=(20, 20, 25), font=font(22, bold=True))
    pen.text((12, 44), f"“{config.prompt}”, seed {config.seed}", fill=(95, 95, 105), font=font(14))
    sheet.paste(plain, (12, 72))
    sheet.paste(right, (plain.width + 24, 72))
    return sheet


def _print_why(score: Callable[[Sequence[str]], list[float]], prompt: str) -> None:
    from fluxsae.features.silencing import silencing_words

    for effect in silencing_words(prompt, score):
        print(f"  without {effect.word!r}: {effect.score:.3g} ({effect.change:+.0%})")


if __name__ == "__main__":
    start(main, HeatmapConfig, __doc__)
