"""Flags that every script which runs FLUX shares, and what they open."""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.prompts import Split, deal, decks, load_prompts, split_items, split_stream, wanted_splits
from train.prompts import iter_prompts

if TYPE_CHECKING:
    from fluxsae.activations.collection import ImagePlan
    from fluxsae.pictures import PictureSet

Purpose = Literal["collect", "score"]


@dataclass(frozen=True, kw_only=True)
class FluxOptions:
    """Which FLUX, and how it generates."""

    flux: str = "miniature"
    """`miniature`, a local folder, or a Hub repository such as black-forest-labs/FLUX.1-dev."""
    revision: str | None = None
    """Commit or tag of the Hub repository."""
    device: str | None = None
    """cuda, mps or cpu; left out, the best that is there."""
    preset: Literal["full", "offload", "int8", "nf4"] | None = None
    """How FLUX is held in memory; left out, chosen from the free memory."""
    allow_inexact: bool = False
    """Accept a quantised or cached FLUX, whose activations are not the model's own; recorded in the run."""
    height: int | None = None
    """Image height, pixels; left out, the model's own."""
    width: int | None = None
    """Image width, pixels; left out, the model's own."""
    num_inference_steps: int | None = None
    """Steps of the schedule; left out, the model's own."""
    guidance_scale: float | None = None
    """Distilled guidance; left out, the model's own."""
    prompts: Path | None = None
    """Prompt file (.txt, .csv, .tsv, .jsonl, .parquet) or a folder of them (a downloaded Hub dataset); left out,
    prompts of a bundled file and a grammar, or captions of drawn scenes for the miniature."""
    prompt_column: str = "prompt"
    """Column of a prompt file that has columns."""
    pictures: Path | None = None
    """Read pictures instead of generating images: a folder, a .parquet file or a folder of such files."""
    caption_column: str | None = None
    """Column or metadata field with the captions of --pictures; left out, caption, text or prompt if there is one."""
    share_prompts: bool = False
    """Let training, held-out and scored images share prompts (or pictures); left out, none is in two of them."""
    seed: int = 0
    """Decides prompts, noise and everything else that is random."""

    def open(self) -> Any:
        """The FLUX pipeline.

        Raises:
            FluxSaeError: no such model, no room for it, or its activations would not be its own.
        """
        from fluxsae.flux import load_flux, why_inexact

        pipe = load_flux(self.flux, revision=self.revision, device=self.device, preset=self.preset)
        reason = why_inexact(pipe)
        if reason is not None and not self.allow_inexact:
            raise FluxSaeError(
                f"The activations of this FLUX are not the model's own: {reason}. "
                "Choose --preset full or offload, or pass --allow-inexact, which the run then records."
            )
        return pipe

    def settings(self, pipe: Any) -> GenerationSettings:
        """The model's own settings with what was asked for."""
        from fluxsae.flux import default_settings

        asked = {name: getattr(self, name) for name in ("height", "width", "num_inference_steps", "guidance_scale")}
        given = {name: value for name, value in asked.items() if value is not None}
        return GenerationSettings(**{**asdict(default_settings(pipe)), **given})

    def build_plan(
        self, count: int, *, purpose: Purpose, settings: GenerationSettings, held_out_every: int = 0
    ) -> "ImagePlan":
        """The images of one purpose: prompts to generate, or pictures to read, none of which serves another purpose.

        Of `count` images every `held_out_every`-th is of the held-out prompts. No picture is read more often than the
        held-out ones have to be, so there may be fewer images than asked for.
        """
        from fluxsae.activations.collection import ImagePlan

        if self.pictures is None:
            prompts = self.load_prompts(count, purpose, held_out_every=held_out_every)
            return ImagePlan.build(prompts, seed=self.seed, purpose=purpose)
        found = self.load_pictures(settings)
        chosen = found.take(self._deal_pictures(found, count, purpose, held_out_every))
        captions = [entry.caption for entry in chosen.entries]
        return ImagePlan.build(captions, seed=self.seed, purpose=purpose, pictures=chosen)

    def load_pictures(self, settings: GenerationSettings) -> "PictureSet":
        """The pictures that can be read, at the size of these settings."""
        from fluxsae.pictures import load_pictures

        assert self.pictures is not None
        return load_pictures(
            self.pictures, height=settings.height, width=settings.width, caption_column=self.caption_column
        )

    def load_prompts(self, count: int, purpose: Purpose, *, held_out_every: int = 0) -> list[str]:
        """`count` prompts of one purpose, from the file, the grammar or drawn scenes; a longer list begins the same."""
        splits = wanted_splits(count, purpose=purpose, held_out_every=held_out_every)
        if self.prompts is not None:
            prompts = load_prompts(self.prompts, column=self.prompt_column)
            return deal(self._streams(prompts, prompts), splits)
        source = iter_captions if self.flux == "miniature" else iter_prompts
        endless = source(f"{self.seed}/{purpose}")
        return deal(dict.fromkeys(splits, endless) if self.share_prompts else split_stream(endless), splits)

    def _streams(self, keys: Sequence[str], items: Sequence[Any]) -> dict[Split, Iterator[Any]]:
        """Endless decks of the items of each split; of all of them for every split where they are shared."""
        if self.share_prompts:
            return {split: decks(items, seed=2 * self.seed + (split == "score")) for split in get_args(Split)}
        return {
            split: decks([items[i] for i in indices], seed=self.seed) for split, indices in split_items(keys).items()
        }

    def _deal_pictures(self, found: "PictureSet", count: int, purpose: Purpose, held_out_every: int) -> list[int]:
        keys = [entry.digest for entry in found.entries]
        indices = {split: range(len(found)) for split in get_args(Split)} if self.share_prompts else split_items(keys)
        splits = wanted_splits(count, purpose=purpose, held_out_every=held_out_every)
        if purpose == "score":
            splits = splits[: len(indices["score"])]
        else:
            n_train = list(itertools.accumulate(split == "train" for split in splits))
            splits = splits[: bisect.bisect_right(n_train, len(indices["train"]))]
        return deal(self._streams(keys, range(len(found))), splits)

    def identity(self) -> dict[str, Any]:
        """The values that decide what is generated, as plain JSON values: of files their content, not their place."""
        names = (
            "flux",
            "revision",
            "height",
            "width",
            "num_inference_steps",
            "guidance_scale",
            "prompt_column",
            "seed",
        )
        values: dict[str, Any] = {**{name: getattr(self, name) for name in names}, "prompts": None}
        if self.prompts is not None:
            from fluxsae.runs.folder import prompts_hash

            values["prompts"] = prompts_hash(load_prompts(self.prompts, column=self.prompt_column))
        if self.pictures is not None:
            from fluxsae.pictures.sources import fingerprint

            values |= {"pictures": fingerprint(self.pictures), "caption_column": self.caption_column}
        return values | ({"share_prompts": True} if self.share_prompts else {})


def iter_captions(seed: int | str) -> Iterator[str]:
    """Captions of random scenes of the miniature's world, without end."""
    from fluxsae.miniature.scenes import caption_scene, sample_scene

    rng = np.random.default_rng([*str(seed).encode()])
    while True:
        yield caption_scene(sample_scene(rng), rng)


def default_hookpoints(n_blocks: int) -> list[HookPoint]:
    """The `ff` of an early and a late of `n_blocks` double-stream blocks: layers 5 and 15 of FLUX.1's 19.

    The miniature's bundled recipe names its own.
    """
    return [HookPoint.parse(f"layer{n_blocks * block // 19}") for block in (5, 15)]


def default_steps(settings: GenerationSettings) -> list[int]:
    """Five steps spread over the schedule: 2, 6, 10, 14, 18 of 20."""
    return sorted({settings.num_inference_steps * part // 10 for part in (1, 3, 5, 7, 9)})


def open_flux(asked: str | None, recorded: str, revision: str | None, *, device: str | None, dtype: Any = None) -> Any:
    """The FLUX that was asked for, or else the one that a run or recipe records, at the revision it records."""
    from fluxsae.flux import load_flux

    return load_flux(asked or recorded, revision=None if asked else revision, device=device, dtype=dtype)
