"""How often *Swap* does what it says, on pictures that nothing was fitted or chosen on (`-m bench`).

Every picture is read back attribute by attribute, by the reader that judges the miniature, not by CLIP.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from fluxsae.artifacts import RunFolder
from fluxsae.demos import in_place
from fluxsae.errors import FluxSaeError
from fluxsae.evaluation.intervals import bootstrap_weights, interval
from fluxsae.evaluation.outcomes import compare_scenes
from fluxsae.evaluation.truths import Concept
from fluxsae.flux import generate
from fluxsae.miniature import miniature_path
from fluxsae.miniature.scenes import ATTRIBUTES, Scene, caption_scene, read_scene, sample_scene
from fluxsae.ui.desk_steer import SteerDesk
from fluxsae.ui.lane import Done
from fluxsae.ui.requests import SteerRequest
from fluxsae.ui.session import Workbench

pytestmark = pytest.mark.bench

N_PICTURES, SEED = 40, 577_215


@dataclass(frozen=True)
class Tried:
    """One swap of one name on one fresh picture, as the page does it."""

    is_done: bool
    """Whether the picture shows the new name, and the old one nowhere."""
    is_specific: bool
    """Whether every other attribute of both objects and of the background reads as before."""
    is_claimed: bool
    """Whether the page said so: CLIP reads the new name, and a feature of the old one fires."""
    prompt_does: bool
    """Whether the prompt with the new name, at the same seed, shows it without the old one."""


def shows(scene: Scene, attribute: str, old: str, new: str) -> bool:
    """Whether a scene shows a new value and not the old one."""
    found = scene.concepts()
    return (attribute, new) in found and (attribute, old) not in found


@pytest.fixture(scope="module", params=["colour", "texture", "shape"])
def tried(request: pytest.FixtureRequest) -> tuple[str, list[Tried]]:
    """Swaps of names of one attribute on fresh pictures of two objects that show what their prompts say."""
    attribute = str(request.param)
    desk = SteerDesk(Workbench(RunFolder(miniature_path("run"))))
    bench, rng, found, seed = desk.bench, np.random.default_rng([SEED, len(attribute)]), [], SEED
    known, steps = set(bench.images.prompts), bench.limits.default_steps
    names = [name for name in ATTRIBUTES[attribute] if name in desk.names]
    print(f"\n\n{attribute}: {', '.join(names)}")
    while len(found) < N_PICTURES:
        seed += 1
        scene = sample_scene(rng, n_objects=2)
        prompt = caption_scene(scene, rng, keep=1.0)
        here = {getattr(thing, attribute) for thing in scene.objects}
        old = getattr(scene.objects[0], attribute)
        free = [name for name in names if name not in here]
        if prompt in known or len(here) < 2 or old not in names or not free:
            continue
        new = free[int(rng.integers(len(free)))]
        settings = bench.settings(steps)
        before, other = (
            read_scene(generate(bench.pipe, text, seeds=seed, settings=settings)[0])
            for text in (prompt, in_place(prompt, old, new))
        )
        if not before.concepts() >= scene.concepts() or len(before.objects) != 2:
            continue
        prompt_does = shows(other, attribute, old, new)
        try:
            *_, swapped = desk.swap(prompt, seed, steps, old, new)
        except FluxSaeError:  # no feature of the old name fires
            found.append(Tried(False, True, False, prompt_does))
            continue
        assert isinstance(swapped, Done)
        page, warning = swapped.value
        edits = [desk._edit(slider).to_dict() for slider in page["edits"]]
        values = {"prompt": prompt, "edits": edits, "seed": seed, "num_inference_steps": steps}
        *_, steered = desk.steer(SteerRequest.parse(bench.limits, **values))
        assert isinstance(steered, Done)
        after = read_scene(steered.value[1])
        specific = compare_scenes(before, after, Concept(attribute, new)).is_specific
        found.append(Tried(shows(after, attribute, old, new), specific, warning is None, prompt_does))
    return attribute, found


def test_what_a_swap_says_it_did_it_did(tried: tuple[str, list[Tried]]) -> None:
    attribute, found = tried
    weights = bootstrap_weights(len(found), draws=2000, seed=0)

    def share(what: str, hits: list[bool], of: list[bool]) -> float:
        if not any(of):
            print(f"  {what}: none")
            return 0.0
        hit, every = np.logical_and(hits, of).astype(np.float64), np.array(of, dtype=np.float64)
        counts = weights @ every
        value = interval((weights @ hit)[counts > 0] / counts[counts > 0])
        share = float(hit.sum() / every.sum())
        print(f"  {what}: {share:.2f} [{value.low:.2f}, {value.high:.2f}] of {int(every.sum())}")
        return share

    every, claimed = [True] * len(found), [each.is_claimed for each in found]
    share("done", [each.is_done for each in found], every)
    share("nothing else changed", [each.is_specific for each in found], every)
    share("both", [each.is_done and each.is_specific for each in found], every)
    share("said to be done", claimed, every)
    right = share("done where it was said", [each.is_done for each in found], claimed)
    share("done by the prompt at the same seed", [each.prompt_does for each in found], every)
    if attribute == "colour":
        assert right >= 0.7
