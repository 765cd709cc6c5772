"""Names against known scenes: does the picture bear a name out, and where beside what it names does a feature fire?"""

from collections.abc import Mapping
from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Integer

from fluxsae.features.naming import PLACES, NamePlace
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.laboratory.truths import COVERED, covered_share
from fluxsae.miniature.scenes import ATTRIBUTES, Scene, SceneObject

GROUND: Final = "background"
"""The attribute that no object has; as a word of a name it only says that the name is of the ground."""
OF_THINGS: Final = tuple(attribute for attribute in ATTRIBUTES if attribute != GROUND)
FIRES: Final = 0.5
"""Share of a feature's highest score from which an image counts where its place is found."""
LEAST_SHARE: Final = 0.8
"""Share of the images that a place must hold for before it is told of a feature."""
LEAST_IMAGES: Final = 4

Cover = Float[np.ndarray, " tokens"]


def is_true(name: str, scene: Scene) -> bool:
    """Whether every word of a name holds of one object of the scene, or of its ground."""
    return _is_of_ground(name, scene) or bool(_things(name, scene))


def cover_of(name: str, scene: Scene, grid: TokenGrid) -> Cover | None:
    """How much of each token's patch shows what is named, 0 to 1; None where the scene does not show it."""
    things = _things(name, scene)
    if things:
        shown: Cover = np.max([covered_share(thing, grid) for thing in things], axis=0)
        return shown
    if not _is_of_ground(name, scene):
        return None
    hidden = np.sum([np.zeros(grid.n_tokens), *(covered_share(thing, grid) for thing in scene.objects)], axis=0)
    ground: Cover = 1 - np.clip(hidden, 0, 1)
    return ground


def places_of(token: int, cover: Cover, grid: TokenGrid) -> Bool[np.ndarray, " places"]:
    """Which of `PLACES` a token is at, beside what covers `cover` of each patch; the last one, "varies", is never true.

    Inside: a quarter of the patch shows it. At its edge: less than half does, and a patch beside it shows it. Above,
    below, left or right: a patch that does not show it, on that side of the nearest one that does.
    """
    row, col = divmod(token, grid.cols)
    rows, cols = np.nonzero(cover.reshape(grid.rows, grid.cols) >= COVERED)
    if not len(rows):  # all of it is too thin for any patch
        rows, cols = (np.array([each]) for each in divmod(int(cover.argmax()), grid.cols))
    nearest = int(np.argmin(np.hypot(rows - row, cols - col)))
    down, right = row - int(rows[nearest]), col - int(cols[nearest])
    is_off, touches = cover[token] < COVERED, max(abs(down), abs(right)) <= 1
    found = {
        "inside": not is_off,
        "edge": bool(cover[token] < 0.5 and touches),
        "above": bool(is_off and down < 0 and -down >= abs(right)),
        "below": bool(is_off and down > 0 and down >= abs(right)),
        "left": bool(is_off and right < 0 and -right >= abs(down)),
        "right": bool(is_off and right > 0 and right >= abs(down)),
        "away": bool(is_off and not touches),
        "varies": False,
    }
    return np.array([found[place] for place in PLACES])


def find_place(
    name: str,
    scores: Float[np.ndarray, " images"],
    tokens: Integer[np.ndarray, " images"],
    scenes: Mapping[int, Scene],
    *,
    grid: TokenGrid,
    held_out: Bool[np.ndarray, " images"],
) -> NamePlace | None:
    """Where a feature fires beside what it is named after: found on one half of the images, checked on the other.

    Of the images that show what is named and score at least `FIRES` of the highest score, by the token that scores.
    None with fewer than `LEAST_IMAGES` on either half.
    """
    strong = [int(i) for i in np.flatnonzero(scores >= FIRES * max(float(scores.max()), 1e-12)) if int(i) in scenes]
    found = {image: cover_of(name, scenes[image], grid) for image in strong}
    covers = {image: cover for image, cover in found.items() if cover is not None}
    shown = [*covers]
    at = np.array([places_of(int(tokens[image]), cover, grid) for image, cover in covers.items()]).reshape(
        -1, len(PLACES)
    )
    is_out = held_out[shown]
    if min(is_out.sum(), (~is_out).sum()) < LEAST_IMAGES:
        return None
    shares = at[~is_out].mean(axis=0)
    holds = np.flatnonzero(shares >= LEAST_SHARE)
    if not len(holds):
        return NamePlace("varies", 0.0, int(is_out.sum()))
    share = float(at[is_out, holds[0]].mean())
    return NamePlace(list(PLACES)[holds[0]] if share >= LEAST_SHARE else "varies", share, int(is_out.sum()))


def _words(name: str) -> set[str]:
    """The words of a name without those that only say what kind of thing is meant."""
    return set(name.split()) - set(ATTRIBUTES)


def _things(name: str, scene: Scene) -> list[SceneObject]:
    words = _words(name)
    if not words or GROUND in name.split():
        return []
    return [thing for thing in scene.objects if words <= {getattr(thing, attribute) for attribute in OF_THINGS}]


def _is_of_ground(name: str, scene: Scene) -> bool:
    return _words(name) == {scene.background}
