"""Recipes that work, to begin with on the Steer tab: swaps of one name for another, and features suppressed."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import varied
from fluxsae.pictures.grids import split_pictures
from fluxsae.steering.edits import Recipe, SteeringEdit
from fluxsae.ui.kit import views
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.steer.words import LEAST_SEEN, share_seen, short_words

log = logging.getLogger("fluxsae.app")

MAX_STARTERS: Final = 6
MAX_SWAPS: Final = 4
SEEN: Final = 0.15
"""Share of the best one's score, as CLIP sees it, from which a starter shows what its name says."""
SliderOf = Callable[[SteeringEdit], dict[str, Any]]


def find_starters(bench: Workbench, slider_of: SliderOf) -> list[dict[str, Any]]:
    """Swaps first, then features suppressed, each the clearest first.

    `slider_of` gives the slider that stands for an edit, and refuses an edit that none does.
    """
    places = list(reversed(bench.hookpoints))
    swaps = [(name, swap) for name in places for swap in bench.swaps(name)]
    swapped = [starter for name, swap in swaps if (starter := _swapped(bench, slider_of, name, swap)) is not None]
    clear = _clear(swapped)
    order = varied(range(len(clear)), [str(starter["edits"][0]["feature"]) for starter in clear])
    found = [clear[place] for place in order[:MAX_SWAPS]]
    demos = [(name, demo) for name in places for demo in bench.demos(name)]
    made = [starter for name, demo in demos if (starter := _less(bench, slider_of, name, demo)) is not None]
    gone = [starter["gone"] for starter in made if starter["gone"] is not None]
    seen = [starter for starter in made if starter["gone"] is None or starter["gone"] >= SEEN * max(gone)]
    by_label: dict[str, dict[str, Any]] = {}
    for starter in sorted(seen, key=lambda starter: -starter["clarity"]):
        by_label.setdefault(starter["label"], starter)
    return [*found, *by_label.values()][:MAX_STARTERS]


def _clear(swapped: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those with a good share of the best score, the best first."""
    best = max((starter["score"] for starter in swapped), default=0.0)
    return sorted((one for one in swapped if one["score"] >= SEEN * best), key=lambda one: -one["score"])


def _swapped(bench: Workbench, slider_of: SliderOf, hookpoint: str, swap: Mapping[str, Any]) -> dict[str, Any] | None:
    """A starter that puts one name in place of another; None if no slider stands for it, or nobody would see it."""
    try:
        recipe = _own_recipe(bench, swap["recipe"])
        made = _starter(recipe, slider_of, _pictures(bench.run.demo_image_path(hookpoint, swap["image"]), 2), 0, 1)
        old, new = str(swap["label"]), str(swap["new_label"])
        score = float(swap["score"]["score"])
    except (KeyError, TypeError, ValueError, FluxSaeError) as error:
        log.warning("a swap of %s is passed over: %s", hookpoint, error)
        return None
    if made is None or len(made["edits"]) < 2:
        return None
    sliders = made["edits"]
    return {
        **made,
        "title": f"{old.capitalize()} becomes {new}",
        "names": ["before", "after"],
        "panels": ["", f"{new} added where {old} was removed"],
        "colours": [sliders[0]["colour"], sliders[1]["colour"]],
        "score": score,
    }


def _less(bench: Workbench, slider_of: SliderOf, hookpoint: str, demo: Mapping[str, Any]) -> dict[str, Any] | None:
    """A starter that suppresses a feature; what is added everywhere, as the demo does too, spills over."""
    try:
        recipe = _own_recipe(bench, demo["recipes"]["less"])
        made = _starter(recipe, slider_of, _pictures(bench.run.demo_image_path(hookpoint, demo["image"]), 3), 1, 0)
        recipes = [Recipe.from_dict(dict(demo["recipes"][side])) for side in ("less", "before", "more")]
        panels = ["; ".join(map(short_words, recipe.edits)) for recipe in recipes]
        clear, label_less = clarity(demo["score"]), demo["score"].get("label_less")
    except (KeyError, TypeError, ValueError, FluxSaeError) as error:
        log.warning("a demo of %s is passed over: %s", hookpoint, error)
        return None
    if made is None:
        return None
    label = ", ".join(str(slider["label"] or f"#{slider['feature']}") for slider in made["edits"])
    return {
        **made,
        "title": f"Less {label}",
        "label": label,
        "names": ["less", "original", "more"],
        "panels": panels,
        "colours": [made["edits"][0]["colour"]],
        "clarity": clear,
        "gone": None if label_less is None else -label_less,
    }


def _own_recipe(bench: Workbench, values: Any) -> Recipe:
    """The recipe, if it was made with this run's SAEs."""
    recipe = Recipe.from_dict(values)
    other = recipe.differences(bench.info.identity, bench.fingerprints).get("sae")
    if other:
        raise FluxSaeError(f"{other}.")
    return recipe


def _starter(
    recipe: Recipe, slider_of: SliderOf, pictures: Sequence[Image.Image], before: int, after: int
) -> dict[str, Any] | None:
    """What every starter has; None where nobody sees its picture `after` differ from `before`."""
    if pictures and share_seen(pictures[before], pictures[after]) < LEAST_SEEN:
        return None
    return {
        "pictures": [views.image_url(picture) for picture in pictures],
        "prompt": recipe.prompt,
        "seed": recipe.seed,
        "num_inference_steps": recipe.settings.num_inference_steps,
        "edits": [slider_of(edit) for edit in recipe.edits],
    }


def clarity(score: Mapping[str, Any]) -> float:
    """How clearly a demo of this score shows its feature being suppressed: far, with little else changed or odd."""
    return float(score["less"] * (1 - score["collateral"]) * (1 - score["out_of_distribution"]))


def _pictures(path: Path, count: int) -> list[Image.Image]:
    """The pictures of a demo's strip; none where it is not there."""
    if not path.is_file():
        return []
    with Image.open(path) as strip:
        return split_pictures(strip.convert("RGB"), count)
