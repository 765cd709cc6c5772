"""How often *Swap* does what it says, on pictures that nothing was fitted or chosen on (`-m bench`).

Old and new names are drawn from all values of the attribute, whether the page knows features of them or not. A refusal,
or a picture that cannot be read, is an attempt that failed. Every picture is read back attribute by attribute, by the
reader that judges the miniature, not by CLIP.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from fluxsae.errors import FluxSaeError
from fluxsae.evaluation.intervals import bootstrap_weights, interval, two_level_draws
from fluxsae.flux import generate
from fluxsae.laboratory.outcomes import FAILED, Outcome, compare_swap
from fluxsae.laboratory.swaps import draw_swap, place_of
from fluxsae.laboratory.truths import Concept
from fluxsae.miniature import miniature_path
from fluxsae.miniature.scenes import read_scene
from fluxsae.runs.folder import RunFolder
from fluxsae.ui.serve.lane import Done
from fluxsae.ui.serve.schemas import SteerRequest
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.steer.desk import SteerDesk

pytestmark = pytest.mark.bench

N_PICTURES, SEED = 40, 1_618_033


@dataclass(frozen=True)
class Tried:
    """One attempt to swap one name on one fresh picture, as the page does it."""

    concept: Concept
    """The new name."""
    outcome: Outcome
    is_made: bool
    """Whether the page did not refuse."""
    is_claimed: bool
    """Whether the page said so: CLIP reads the new name, and a feature of the old one fires."""
    prompt: Outcome
    """What the prompt with the new name gives, at the same seed."""


def attempt(desk: SteerDesk, attribute: str, seed: int) -> Tried:
    concept, old, subject = draw_swap(attribute, seed)
    bench, steps = desk.bench, desk.bench.limits.default_steps
    settings = bench.settings(steps)
    before, other = (
        read_scene(generate(bench.pipe, text, seeds=seed, settings=settings)[0])
        for text in (subject.prompt, subject.edited_prompt)
    )
    at = place_of(before, attribute, old)
    if at is None:
        return Tried(concept, FAILED, False, False, FAILED)
    by_prompt = compare_swap(before, other, concept, at=at)
    try:
        *_, swapped = desk.swap(subject.prompt, seed, steps, old, concept.value)
    except FluxSaeError:  # no feature has one of the names, or none of the old name fires
        return Tried(concept, FAILED, False, False, by_prompt)
    assert isinstance(swapped, Done)
    page = swapped.value[3]
    edits = [desk.sliders.edit(slider).to_dict() for slider in page["edits"]]
    values = {"prompt": subject.prompt, "edits": edits, "seed": seed, "num_inference_steps": steps}
    *_, steered = desk.steer(SteerRequest.parse(bench.limits, **values))
    assert isinstance(steered, Done)
    outcome = compare_swap(before, read_scene(steered.value[1]), concept, at=at)
    return Tried(concept, outcome, True, page["unread"] is None, by_prompt)


@pytest.fixture(scope="module", params=["colour", "texture", "thing"])
def tried(request: pytest.FixtureRequest) -> tuple[str, list[Tried]]:
    """Attempts at names of one attribute on fresh pictures of two objects."""
    desk = SteerDesk(Workbench(RunFolder(miniature_path("run"))))
    return str(request.param), [attempt(desk, request.param, SEED + n) for n in range(N_PICTURES)]


def test_what_a_swap_says_it_did_it_did(tried: tuple[str, list[Tried]]) -> None:
    attribute, found = tried
    print(f"\n\n{attribute}, {len(found)} attempts")

    def share(what: str, hits: list[bool]) -> float:
        """Over all attempts; the interval resamples new names, and the attempts at each."""
        names = sorted({each.concept for each in found})
        groups = [
            np.array([hit for hit, each in zip(hits, found, strict=True) if each.concept == name]) for name in names
        ]
        bounds = interval(two_level_draws([group.astype(float) for group in groups], draws=2000, seed=0))
        value = float(np.mean(hits))
        print(f"  {what}: {value:.2f} [{bounds.low:.2f}, {bounds.high:.2f}]")
        return value

    done = [each.outcome.is_success(wanted=True) for each in found]
    claimed = [each.is_claimed for each in found]
    wrong = [claim and not hit for claim, hit in zip(claimed, done, strict=True)]
    share("made", [each.is_made for each in found])
    share("success", done)
    share("specificity", [each.outcome.is_specific for each in found])
    share("both", [each.outcome.is_success(wanted=True) and each.outcome.keeps_others for each in found])
    share("CLIP reads it", claimed)
    wrongly = share("CLIP reads it where it is not done", wrong)
    share("both, another prompt", [t.prompt.is_success(wanted=True) and t.prompt.keeps_others for t in found])
    right = [hit for hit, claim in zip(done, claimed, strict=True) if claim]
    weights = bootstrap_weights(max(len(right), 1), draws=2000, seed=0)
    if right:
        print(f"  done where CLIP reads it: {interval(weights @ np.array(right, float) / len(right))} of {len(right)}")
    assert wrongly <= 0.15  # shapes too: their swaps rarely work, and the page rarely says that one did
    if attribute == "colour":
        assert right
        assert np.mean(right) >= 0.8
