"""What a page opens on: the run's clearest swap at rising strength, and the features of the prompt's words on it."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from fluxsae.features.cards import CardIndex
from fluxsae.features.firing import CONFIDENCE, SparseMaps, ranked_features
from fluxsae.features.vocabulary import has_name
from fluxsae.files import write_bytes, write_json
from fluxsae.flux import capture, generate
from fluxsae.flux.bad_numbers import check_finite
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.hooks import BlockCall
from fluxsae.pictures.grids import join_pictures
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.names import SaeName
from fluxsae.runs.tables import encode_webp
from fluxsae.sae.acts import SparseActs
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.demos.swap_search import Swap
from fluxsae.steering.edits import SteeringEdit
from fluxsae.steering.sweeps import sweep, with_strength

N_PICTURES: Final = 7
"""From the image as it is to the whole swap."""
PICTURE_SIDE: Final = 512
LOOKED_AT: Final = 100


def opening_swap(swaps: Sequence[Swap]) -> Swap | None:
    """Of the swaps that look natural the clearest; None where CLIP sees none happen."""
    natural = [swap for swap in swaps if swap.score.looks_natural and swap.score.score > 0]
    return max(natural, key=lambda swap: swap.score.score, default=None)


def write_opening(run: RunFolder, pipe: Any, saes: Mapping[HookPoint, SparseAutoencoder], swap: Swap) -> None:
    """Makes the swap's image at rising strength, and writes the strip with the features of the prompt's words.

    Their maps are bytes, row by row, 255 standing for the feature's maximum in the run.
    """
    place, settings = SaeName.parse(swap.hookpoint), run.load_info().settings
    turns = [picture / (N_PICTURES - 1) for picture in range(N_PICTURES)]
    variants = [[turned(edit, turn) for edit in swap.recipe.edits] if turn else [] for turn in turns]
    made = sweep(
        pipe, saes, variants, prompt=swap.prompt, seed=swap.seed, settings=settings, allow_mismatch=["unknown"]
    )
    pictures = join_pictures([one.image for one in made])
    write_bytes(run.demo_image_path(place, "opening"), encode_webp(pictures, longest_side=N_PICTURES * PICTURE_SIDE))
    opening = {
        "schema_version": 1,
        "prompt": swap.prompt,
        "seed": swap.seed,
        "label": swap.label,
        "new_label": swap.new_label,
        "turns": turns,
        "features": _features_of_words(run, pipe, saes[place], swap),
    }
    write_json(run.opening_path(place), opening)


def turned(edit: SteeringEdit, turn: float) -> SteeringEdit:
    """A share, 0 to 1, of what an edit does."""
    return with_strength(edit, 1 + turn * (edit.strength - 1) if edit.mode == "scale" else turn * edit.strength)


def _features_of_words(run: RunFolder, pipe: Any, sae: SparseAutoencoder, swap: Swap) -> list[dict[str, Any]]:
    """Of each name that the prompt has, the feature that says most about the image, if its name is sure there."""
    place, steps = SaeName.parse(swap.hookpoint), run.load_info().steps
    acts: dict[int, SparseActs] = {}

    def sink(call: BlockCall) -> None:
        check_finite(call.tokens, [f"the prompt {swap.prompt!r:.60}"], hookpoint=call.hookpoint, step=call.step)
        acts[call.step] = sae.encode_sparse(call.tokens[0], sigma=call.sigma)

    with capture(pipe, [place], steps=steps, sink=sink):
        generate(pipe, swap.prompt, seeds=swap.seed, settings=run.load_info().settings, output_type="latent")
    cards = CardIndex(run, place)
    maps = SparseMaps.build(acts, sigmas=[0.0] * len(acts), own_steps=list(acts))
    found: dict[str, dict[str, Any]] = {}
    for each in ranked_features(maps, cards, step=None, limit=LOOKED_AT):
        label, sure = cards.labels[each.feature], each.label_confidence_here
        if label and label not in found and has_name(swap.prompt, label) and (sure or 0.0) >= CONFIDENCE["sure"]:
            shares = maps.acts(each.feature, None) / max(float(cards.max_acts[each.feature]), 1e-12)
            heat = np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8)
            found[label] = {"feature": each.feature, "map": base64.b64encode(heat.tobytes()).decode("ascii")}
    return list(found.values())
