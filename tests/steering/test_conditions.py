"""Edits with a condition: they act where it holds, and elsewhere no bit changes."""

import json

import numpy as np
import pytest
import torch
from tiny_flux import D_MODEL, SETTINGS, build_tiny_flux

from fluxsae import FluxSaeError, SteeringEdit, generate, steer
from fluxsae.flux import FluxPipeline, denoise_to, embed_prompts, generate_from, initial_noise, velocity
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering import Condition, with_features
from fluxsae.steering.apply import EditedCall

HERE = HookPoint.parse("layer1")
PROMPTS = ["a red circle", "a small blue star"]
STEPS = (1, 4)


class Switch(SparseAutoencoder):
    """Feature 0 is edited; what feature 1 and 2 are seen to do is said here, by step and token."""

    seen: torch.Tensor

    def encode_features(self, x, features, **arguments):
        acts = super().encode_features(x, features, **arguments)
        for place, feature in enumerate(features):
            if feature in (1, 2):
                acts[..., place] = self.seen[self.calls[feature - 1] % len(self.seen), feature - 1]
                self.calls[feature - 1] += 1
        return acts


def build_sae(seen: list[list[list[float]]]) -> Switch:
    """`seen`: call -> feature 1 or 2 -> acts of the 16 tokens (or one number for all)."""
    sae = Switch(SaeConfig(architecture="topk", d_model=D_MODEL, n_features=8, k=4), seed=0)
    sae.reference_acts.copy_(torch.tensor([1.0, 2.0, 0.0, *[1.0] * 5]))
    sae.seen = torch.tensor(seen).expand(-1, -1, 16)
    sae.calls = [0, 0]
    return sae


def edit(when: Condition | None = None, **changes) -> SteeringEdit:
    return SteeringEdit(**{"hookpoint": HERE, "feature": 0, "mode": "add", "strength": 3.0, "steps": STEPS,
                           "when": when, **changes})  # fmt: skip


def image(pipe: FluxPipeline, sae: SparseAutoencoder, edits, *, on_edit=None) -> np.ndarray:
    with steer(pipe, {HERE: sae}, edits, on_edit=on_edit):
        return generate(pipe, PROMPTS[:1], seeds=[1], settings=SETTINGS, output_type="np")[0]


def plain(pipe: FluxPipeline) -> np.ndarray:
    return generate(pipe, PROMPTS[:1], seeds=[1], settings=SETTINGS, output_type="np")[0]


ABSENT, PRESENT = [[0.9], [0.0]], [[1.1], [0.0]]
"""Feature 1 just below and just above half of its reference activation, 2.0."""


def test_where_the_condition_does_not_hold_the_image_is_bit_identical(tiny_flux: FluxPipeline) -> None:
    assert np.array_equal(image(tiny_flux, build_sae([ABSENT]), [edit(Condition((1,), 0.5))]), plain(tiny_flux))


def test_where_it_holds_the_edit_is_the_one_without_it(tiny_flux: FluxPipeline) -> None:
    unconditional = image(tiny_flux, build_sae([PRESENT]), [edit()])
    assert not np.array_equal(unconditional, plain(tiny_flux))
    assert np.array_equal(image(tiny_flux, build_sae([PRESENT]), [edit(Condition((1,), 0.5))]), unconditional)


def test_from_the_step_at_which_it_first_holds_the_edit_acts_to_the_windows_end(tiny_flux: FluxPipeline) -> None:
    edited: list[tuple[int, bool]] = []

    def note(call: EditedCall) -> None:
        edited.append((call.call.step, bool(call.delta.any())))

    sae = build_sae([ABSENT, PRESENT, ABSENT])
    image(tiny_flux, sae, [edit(Condition((1,), 0.5))], on_edit=note)
    assert edited == [(0, False), (1, False), (2, True), (3, True)]
    edited.clear()
    sae.calls[0] = 0
    image(tiny_flux, sae, [edit(Condition((1,), 0.5, "token"))], on_edit=note)
    assert edited == [(0, False), (1, False), (2, True), (3, False)]


def test_each_run_begins_anew(tiny_flux: FluxPipeline) -> None:
    sae = build_sae([PRESENT, PRESENT, PRESENT, ABSENT, ABSENT, ABSENT])
    with steer(tiny_flux, {HERE: sae}, [edit(Condition((1,), 0.5))]):
        first, second = (
            generate(tiny_flux, PROMPTS[:1], seeds=[1], settings=SETTINGS, output_type="np")[0] for _ in range(2)
        )
    assert not np.array_equal(first, plain(tiny_flux))
    assert np.array_equal(second, plain(tiny_flux))


def test_a_pass_beside_a_run_does_not_make_it_forget_that_the_condition_has_held(tiny_flux: FluxPipeline) -> None:
    edited: list[tuple[int, bool]] = []
    embeddings = embed_prompts(tiny_flux, PROMPTS[:1], SETTINGS)
    latents = initial_noise(tiny_flux, [1], SETTINGS)

    def look_aside(step: int, n_steps: int) -> None:
        if step == 1:
            velocity(tiny_flux, latents, embeddings, step=0, settings=SETTINGS)

    with steer(
        tiny_flux, {HERE: build_sae([PRESENT, ABSENT, ABSENT])}, [edit(Condition((1,), 0.5))],
        on_edit=lambda call: edited.append((call.call.step, bool(call.delta.any()))),
    ):  # fmt: skip
        generate(tiny_flux, PROMPTS[:1], seeds=[1], settings=SETTINGS, output_type="latent", on_step=look_aside)
    assert edited == [(0, False), (1, True), (0, False), (2, True), (3, True)]


def test_at_tokens_the_edit_acts_only_where_the_feature_is(tiny_flux: FluxPipeline) -> None:
    calls: list[EditedCall] = []
    acts = [1.1, 0.9, 1.0, 1.2] + [0.0] * 12
    image(tiny_flux, build_sae([[acts, [0.0] * 16]]), [edit(Condition((1,), 0.5, "token"))], on_edit=calls.append)
    assert [int(token) for token in calls[1].delta[0].any(dim=-1).nonzero()] == [0, 3]


def test_every_image_of_a_batch_is_asked_for_itself(tiny_flux: FluxPipeline) -> None:
    # call by call: step 1 of image 0, step 1 of image 1, step 2 of image 0, ...
    def run(edits) -> np.ndarray:
        with steer(tiny_flux, {HERE: build_sae([ABSENT, PRESENT])}, edits):
            return generate(tiny_flux, PROMPTS, seeds=[1, 2], settings=SETTINGS, output_type="np")

    unedited = generate(tiny_flux, PROMPTS, seeds=[1, 2], settings=SETTINGS, output_type="np")
    conditional = edit(Condition((1,), 0.5))
    for edits in ([conditional], [[conditional], [conditional]]):
        found = run(edits)
        assert np.array_equal(found[0], unedited[0])
        assert not np.array_equal(found[1], unedited[1])


def test_any_feature_will_do_and_one_of_unknown_reference_needs_level_zero(tiny_flux: FluxPipeline) -> None:
    fires = [[0.0], [0.3]]  # feature 2, whose reference activation is unknown
    untouched = plain(tiny_flux)
    assert not np.array_equal(image(tiny_flux, build_sae([fires]), [edit(Condition((1, 2), 0.0))]), untouched)
    assert np.array_equal(image(tiny_flux, build_sae([fires]), [edit(Condition((1, 2), 0.1))]), untouched)


def test_weights_ask_for_a_sum_at_one_token(tiny_flux: FluxPipeline) -> None:
    # feature 1 counts in multiples of 2.0: 1.0 * 1.6 / 2 - 0.5 * 0.8 / 1 = 0.4 where both fire
    both, one = [[1.6] + [0.0] * 15, [0.8] + [0.0] * 15], [[1.6] + [0.0] * 15, [0.0, 0.8] + [0.0] * 14]
    untouched = plain(tiny_flux)
    for acts, above, is_same in ((both, 0.41, True), (both, 0.39, False), (one, 0.79, False), (one, 0.81, True)):
        sae = build_sae([acts])
        sae.reference_acts[2] = 1.0
        found = image(tiny_flux, sae, [edit(Condition((1, 2), above, weights=(1.0, -0.5)))])
        assert np.array_equal(found, untouched) == is_same


def test_least_asks_for_several_features_at_one_token(tiny_flux: FluxPipeline) -> None:
    both, apart = [[1.6] + [0.0] * 15, [0.8] + [0.0] * 15], [[1.6] + [0.0] * 15, [0.0, 0.8] + [0.0] * 14]
    untouched = plain(tiny_flux)
    for acts, is_same in ((both, False), (apart, True)):
        sae = build_sae([acts])
        sae.reference_acts[2] = 1.0
        found = image(tiny_flux, sae, [edit(Condition((1, 2), 0.5, least=2))])
        assert np.array_equal(found, untouched) == is_same


def test_a_feature_of_unknown_reference_counts_for_nothing_in_a_sum(tiny_flux: FluxPipeline) -> None:
    sae = build_sae([[[1.6], [5.0]]])
    found = image(tiny_flux, sae, [edit(Condition((1, 2), 0.81, weights=(1.0, 1.0)))])
    assert np.array_equal(found, plain(tiny_flux))


def test_the_condition_reads_the_true_acts() -> None:
    pipe = build_tiny_flux()
    sae = SparseAutoencoder(SaeConfig(architecture="topk", d_model=D_MODEL, n_features=8, k=4), seed=0)
    sae.reference_acts.fill_(1.0)
    seen: list[torch.Tensor] = []
    with steer(pipe, {HERE: sae}, [edit(strength=0.0)], on_edit=lambda call: seen.append(call.call.tokens)):
        untouched = generate(pipe, PROMPTS[0], seeds=1, settings=SETTINGS, output_type="np")
    highest = max(float(sae.encode(tokens)[..., 1].detach().max()) for tokens in seen[STEPS[0] : STEPS[1]])
    for above, is_same in ((highest * 0.99, False), (highest * 1.01, True)):
        found = image(pipe, sae, [edit(Condition((1,), above))])
        assert np.array_equal(found, untouched[0]) == is_same


def test_a_generation_taken_up_midway_decides_as_the_whole_one(tiny_flux: FluxPipeline) -> None:
    whole = image(tiny_flux, build_sae([PRESENT]), [edit(Condition((1,), 0.5))])
    snapshot = denoise_to(tiny_flux, PROMPTS[0], seeds=1, settings=SETTINGS, step=1)
    with steer(tiny_flux, {HERE: build_sae([PRESENT])}, [edit(Condition((1,), 0.5))]):
        assert np.array_equal(generate_from(tiny_flux, snapshot, output_type="np")[0], whole)


@pytest.mark.parametrize(
    "when",
    [
        Condition((3, 7), 0.25),
        Condition((1,), 0.0, "token", label="red"),
        Condition(label="a red thing"),
        Condition((3, 7), 0.25, weights=(1.0, -0.5)),
        Condition((3, 7), 0.25, least=2),
    ],
)
def test_a_condition_reads_back_from_its_json(when: Condition) -> None:
    conditional = edit(when)
    assert SteeringEdit.from_json(conditional.to_json()) == conditional
    assert "when" not in json.loads(edit().to_json())
    assert hash(conditional) != hash(edit())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "names features or a label"),
        ({"label": " "}, "names features or a label"),
        ({"features": [1], "above": -1}, "above"),
        ({"features": [1], "at": "picture"}, "at"),
        ({"features": [-1]}, "features"),
        ({"features": [True]}, "features"),
        ({"features": [1], "then": 2}, "then is unknown"),
        ({"features": [1], "weights": [1, 2]}, "2 weights for 1 features"),
        ({"label": "red", "weights": [1]}, "1 weights for 0 features"),
        ({"features": [1], "weights": [1000]}, "weights"),
        ({"features": [1], "least": 2}, "least is 2 with 1 features"),
        ({"features": [1, 2], "weights": [1, 1], "least": 2}, "and 2 weights"),
        ("red", "when"),
    ],
)
def test_wrong_conditions_are_refused_by_name(values: object, words: str) -> None:
    with pytest.raises(FluxSaeError, match=words):
        SteeringEdit.from_dict({"hookpoint": "layer1", "feature": 0, "mode": "add", "strength": 1.0, "when": values})


@pytest.mark.parametrize(
    ("when", "words"),
    [
        (Condition((8,)), "names feature 8; the SAE at transformer_blocks.1.ff has features 0 to 7"),
        (Condition((2,)), "unknown for feature 2"),
        (Condition(label="red"), "names the label 'red' without its features"),
    ],
)
def test_conditions_that_do_not_fit_the_sae_are_refused_before_generation(
    tiny_flux: FluxPipeline, when: Condition, words: str
) -> None:
    with pytest.raises(FluxSaeError, match=words), steer(tiny_flux, {HERE: build_sae([ABSENT])}, [edit(when)]):
        pytest.fail("it was let in")


def test_a_label_stands_for_its_features() -> None:
    known = {(HERE, "red"): [3, 5]}
    (filled, other) = with_features(
        [edit(Condition(label="red", above=0.7)), edit()], lambda *asked: known.get(asked, ())
    )
    assert filled.when == Condition((3, 5), 0.7, label="red")
    assert other == edit()
    with pytest.raises(FluxSaeError, match=r"No feature at .* has the label 'blue'"):
        with_features([edit(Condition(label="blue"))], lambda *asked: known.get(asked, ()))
