import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_flux import D_MODEL, SETTINGS, build_tiny_flux
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.flux import FluxPipeline, block_hooks, capture, generate
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.runs.names import SaeName
from fluxsae.sae.config import MISMATCHES, SaeConfig, TrainedOn
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.apply import EditedCall, add_delta, edit_coefficient, edit_delta, edit_window, steer
from fluxsae.steering.edits import HeatmapRegion, SteeringEdit

DOUBLE, SINGLE = HookPoint.parse("layer1"), HookPoint.parse("single_transformer_blocks.1")
PLACES = [DOUBLE, SINGLE, HookPoint.parse("transformer_blocks.1"), HookPoint.parse("transformer_blocks.1.attn:text")]
IDENTITIES = [("scale", 1.0), ("add", 0.0), ("ablate", 0.0), ("project_out", 0.0)]
WITH_CFG = replace(SETTINGS, true_cfg_scale=3.0, negative_prompt="a blue star")
EMPTY_REGION = [[0] * 4] * 4


def random_sae(architecture: str = "topk", *, d_model: int = D_MODEL, seed: int = 0) -> SparseAutoencoder:
    """An SAE with every parameter filled, so that no term of a formula is hidden by a zero."""
    k = None if architecture in ("l1", "jumprelu") else 6
    sae = SparseAutoencoder(SaeConfig(architecture=architecture, d_model=d_model, n_features=48, k=k), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name in ("b_enc", "b_dec", "input_mean"):
            getattr(sae, name).copy_(0.1 * torch.randn(getattr(sae, name).shape, generator=generator))
        sae.input_scale.fill_(0.7)
        sae.reference_acts.copy_(torch.rand(48, generator=generator) + 0.5)
        if sae.config.has_threshold:
            sae.threshold.fill_(0.2)
    return sae.requires_grad_(False)


def trained_on(**changes: object) -> TrainedOn:
    fields = {
        "flux_id": "tiny", "hookpoint": str(DOUBLE), "steps": (1, 2), "sigmas": (0.8, 0.6), "height": 32, "width": 32,
        "guidance_scale": 3.5, "n_tokens": 16, "dataset_hash": "x", "sigma_tolerance": 0.01,
    }  # fmt: skip
    return TrainedOn(**{**fields, **changes})


SAES = {hookpoint: random_sae(seed=seed) for seed, hookpoint in enumerate(PLACES)}
ALL = (0, SETTINGS.num_inference_steps)


def latents(
    pipe: FluxPipeline, edits: object = None, *, n: int = 1, how=SETTINGS, saes=SAES, **options: object
) -> Tensor:
    """Packed latents of n images, unsteered with edits=None."""
    request = {"prompts": ["a red circle"] * n, "seeds": list(range(n)), "settings": how, "output_type": "latent"}
    if edits is None:
        return generate(pipe, **request)
    with steer(pipe, saes, edits, **options):
        return generate(pipe, **request)


def bits(x: Tensor) -> Tensor:
    """Bit patterns: unlike ==, these tell -0.0 from 0.0."""
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def alive_feature(pipe: FluxPipeline, hookpoint: HookPoint, step: int = 2) -> int:
    """The feature with the largest activation on the usual image at one step."""
    with capture(pipe, [hookpoint], steps=[step]) as captured:
        latents(pipe)
    return int(SAES[hookpoint].encode(captured.get(hookpoint, step)).amax(dim=(0, 1)).argmax())


def test_two_saes_of_one_hook_point_edit_the_same_unedited_tokens(tiny_flux: FluxPipeline) -> None:
    variant = SaeName.parse(f"{DOUBLE}@other")
    saes = {DOUBLE: SAES[DOUBLE], variant: random_sae("l1", seed=7)}
    features = [alive_feature(tiny_flux, DOUBLE), 3]
    pairs = [(str(DOUBLE), features[0]), (str(variant), features[1])]
    edits = [SteeringEdit(name, feature, "add", 2.0, steps=ALL) for name, feature in pairs]
    scaled = [SteeringEdit(name, feature, "scale", -4.0, steps=ALL) for name, feature in pairs]
    seen: dict[str, list[Tensor]] = {}
    parts: list[Tensor] = []

    def note(made: EditedCall) -> None:
        seen.setdefault(str(made.call.hookpoint), []).append(made.delta)

    for chosen in ([edits[0]], [edits[1]], edits, [scaled[0]], [scaled[1]], scaled):
        seen.clear()
        latents(tiny_flux, chosen, saes=saes, on_edit=note)
        first = {name: deltas[0] for name, deltas in seen.items()}
        if len(chosen) == 1:
            parts += first.values()
            continue
        assert set(first) == {str(DOUBLE), str(variant)}
        for both in first.values():
            torch.testing.assert_close(both, parts[-2] + parts[-1])
    assert torch.equal(latents(tiny_flux, edits, saes=saes), latents(tiny_flux, edits[::-1], saes=saes))


# The modes, on numbers that can be checked by hand


@pytest.mark.parametrize(
    ("mode", "strength", "expected"),
    [
        ("scale", 3.0, [4.0, 0.0]),  # (3 - 1) * z * input_scale = 2 * [4, 0] * 0.5
        ("scale", 1.0, [0.0, 0.0]),
        ("add", 3.0, [3.0, 3.0]),  # 3 * a * input_scale = 3 * 2 * 0.5, also where the feature is silent
        ("clamp", 3.0, [1.0, 3.0]),  # (3 * a - z) * input_scale = (6 - [4, 0]) * 0.5
        ("ablate", 0.5, [-1.0, 0.0]),  # -0.5 * [4, 0] * 0.5
        ("project_out", 0.5, [-5.0, 3.0]),  # -0.5 * [10, -6], in raw units
    ],
)
def test_each_mode_is_its_formula(mode: str, strength: float, expected: list[float]) -> None:
    coefficient = edit_coefficient(
        mode,
        strength,
        acts=torch.tensor([4.0, 0.0]),
        projection=torch.tensor([10.0, -6.0]),
        reference=2.0,
        input_scale=0.5,
    )
    assert coefficient.tolist() == expected


def hand_made_sae() -> SparseAutoencoder:
    """Two dimensions, two features along the axes, top-1; input_mean (1, 0), input_scale 2."""
    sae = SparseAutoencoder(SaeConfig(architecture="topk", d_model=2, n_features=2, k=1), seed=None)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
        sae.input_mean.copy_(torch.tensor([1.0, 0.0]))
        sae.input_scale.fill_(2.0)
        sae.reference_acts.copy_(torch.tensor([0.5, 0.0]))
    return sae.requires_grad_(False)


@pytest.mark.parametrize(
    ("mode", "strength", "expected"),
    [
        # x~ of the two tokens: ((5 - 1) / 2, 2 / 2) = (2, 1) and ((2 - 1) / 2, 6 / 2) = (0.5, 3); top-1 keeps
        # feature 0 (z = 2) at the first token and feature 1 at the second, where feature 0 is gated off (z = 0).
        ("scale", 3.0, [[5 + 2 * 2 * 2, 2], [2, 6]]),
        ("add", 3.0, [[5 + 3 * 0.5 * 2, 2], [2 + 3 * 0.5 * 2, 6]]),
        ("clamp", 3.0, [[5 + (1.5 - 2) * 2, 2], [2 + 1.5 * 2, 6]]),
        ("ablate", 1.0, [[5 - 2 * 2, 2], [2, 6]]),
        ("project_out", 0.5, [[5 - 0.5 * 4, 2], [2 - 0.5 * 1, 6]]),
    ],
)
def test_an_edit_on_hand_made_tokens(mode: str, strength: float, expected: list[list[float]]) -> None:
    x = torch.tensor([[[5.0, 2.0], [2.0, 6.0]]])
    edit = SteeringEdit(DOUBLE, 0, mode, strength, steps=ALL)
    assert add_delta(x, edit_delta(edit, hand_made_sae(), x)).tolist() == [expected]


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        (None, [[1.0, 1.0], [1.0, 1.0]]),
        ([[0, 1]], [[0.0, 1.0], [0.0, 1.0]]),
        (HeatmapRegion(0.0), [[1.0, 0.0], [1.0, 1.0]]),  # acts are [[2, 0], [0.1, 7]]
        (HeatmapRegion(0.5), [[1.0, 0.0], [0.0, 1.0]]),  # above 0.5 * reference = 0.25
    ],
)
def test_regions_choose_the_tokens(region: object, expected: list[list[float]]) -> None:
    sae = hand_made_sae()
    # x~ = acts where the other feature is smaller: tokens with z = 2, 0 and 0.1, 7
    x = torch.tensor([[[5.0, 0.0], [1.0, 2.0]], [[1.2, 0.0], [15.0, 0.0]]])
    edit = SteeringEdit(DOUBLE, 0, "add", 1.0, steps=ALL, region=region)
    touched = edit_delta(edit, sae, x)[..., 0] / (0.5 * 2.0)
    assert touched.tolist() == expected


@given(
    st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=40), st.sampled_from([torch.bfloat16, torch.float32])
)
@settings(max_examples=50)
def test_adding_nothing_keeps_every_bit(values: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor([*values, -0.0, 0.0], dtype=dtype)
    for zero in (0.0, -0.0):
        assert torch.equal(bits(add_delta(x, torch.full_like(x, zero, dtype=torch.float32))), bits(x))


@pytest.mark.parametrize("architecture", ["l1", "topk", "batchtopk", "jumprelu", "matryoshka"])
def test_the_edit_reads_the_exact_acts_of_every_architecture(architecture: str) -> None:
    sae = random_sae(architecture)
    x = torch.randn(2, 16, D_MODEL, generator=torch.Generator().manual_seed(5))
    acts = sae.encode(x)
    for feature in range(0, 48, 7):
        delta = edit_delta(SteeringEdit(DOUBLE, feature, "ablate", 1.0, steps=ALL), sae, x)
        expected = -acts[..., feature, None] * sae.input_scale * sae.W_dec[feature]
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)


# Nothing is exactly nothing


@pytest.mark.parametrize("how", [SETTINGS, WITH_CFG], ids=["plain", "true_cfg"])
@pytest.mark.parametrize("hookpoint", [DOUBLE, SINGLE], ids=str)
@pytest.mark.parametrize("n", [1, 4])
def test_identity_edits_leave_images_bit_identical(tiny_flux: FluxPipeline, n: int, hookpoint: HookPoint, how) -> None:
    plain = bits(latents(tiny_flux, n=n, how=how))
    feature = alive_feature(tiny_flux, hookpoint)
    edits = [SteeringEdit(hookpoint, feature, mode, strength, steps=ALL) for mode, strength in IDENTITIES]
    edits.append(SteeringEdit(hookpoint, feature, "clamp", 5.0, steps=(2, 2)))
    edits.append(SteeringEdit(hookpoint, feature, "clamp", 5.0, steps=ALL, region=EMPTY_REGION))
    for edit in edits:
        assert torch.equal(bits(latents(tiny_flux, [edit], n=n, how=how)), plain), edit
    assert torch.equal(bits(latents(tiny_flux, edits, n=n, how=how)), plain)


def test_an_identity_edit_goes_through_the_arithmetic(tiny_flux: FluxPipeline) -> None:
    seen: list[EditedCall] = []
    latents(tiny_flux, [SteeringEdit(DOUBLE, 0, "scale", 1.0, steps=(1, 3))], on_edit=seen.append)
    assert [call.call.step for call in seen] == [0, 1, 2, 3]
    assert all(torch.equal(bits(call.edited), bits(call.call.tokens)) for call in seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_identity_holds_in_half_precision(dtype: torch.dtype) -> None:
    pipe = build_tiny_flux().to(dtype)
    edits = [SteeringEdit(DOUBLE, 3, mode, strength, steps=ALL) for mode, strength in IDENTITIES]
    assert torch.equal(bits(latents(pipe, edits)), bits(latents(pipe)))


# An edit does what it says, and nothing else


@pytest.mark.parametrize("hookpoint", PLACES, ids=str)
def test_an_edit_changes_the_image_at_every_kind_of_hook_point(tiny_flux: FluxPipeline, hookpoint: HookPoint) -> None:
    edit = SteeringEdit(hookpoint, alive_feature(tiny_flux, hookpoint), "add", 30.0, steps=ALL)
    assert (latents(tiny_flux, [edit]) - latents(tiny_flux)).abs().max() > 1e-4


def test_only_the_delta_is_added_never_a_reconstruction(tiny_flux: FluxPipeline) -> None:
    feature = alive_feature(tiny_flux, DOUBLE)
    seen: list[EditedCall] = []
    latents(tiny_flux, [SteeringEdit(DOUBLE, feature, "scale", 4.0, steps=(2, 3))], on_edit=seen.append)
    x, sae = seen[2].call.tokens, SAES[DOUBLE]
    expected = x + 3.0 * sae.encode(x)[..., feature, None] * sae.W_dec[feature] * sae.input_scale
    torch.testing.assert_close(seen[2].edited, expected, rtol=1e-5, atol=1e-6)
    assert [bool(call.delta.any()) for call in seen] == [False, False, True, False]


def test_edits_act_on_the_conditional_pass_only(tiny_flux: FluxPipeline) -> None:
    passes: list[tuple[bool, Tensor]] = []
    edit = SteeringEdit(DOUBLE, 1, "add", 20.0, steps=ALL)
    handler = {HookPoint.parse("transformer_blocks.1"): lambda call: passes.append((call.is_conditional, call.tokens))}
    with block_hooks(tiny_flux, handler):
        latents(tiny_flux, how=WITH_CFG)
        plain, _ = passes[:], passes.clear()
        latents(tiny_flux, [edit], how=WITH_CFG)
    assert [kind for kind, _ in passes] == [True, False] * 4
    assert not torch.equal(passes[0][1], plain[0][1])
    assert torch.equal(passes[1][1], plain[1][1])


def test_every_batch_item_gets_its_own_edits(tiny_flux: FluxPipeline) -> None:
    strong = [SteeringEdit(DOUBLE, feature, "add", 20.0, steps=(1, 4)) for feature in (3, 5)]
    edits = [[], [strong[0]], [strong[1]], strong]
    together, plain = latents(tiny_flux, edits, n=4), latents(tiny_flux, n=4)
    assert torch.equal(together[0], plain[0])
    for item in range(1, 4):
        alone = latents(tiny_flux, edits[item], n=4)
        assert torch.equal(together[item], alone[item])
        assert (together[item] - plain[item]).abs().max() > 1e-4


def test_edits_commute_to_the_last_bit(tiny_flux: FluxPipeline) -> None:
    edits = [
        SteeringEdit(DOUBLE, 4, "add", 2.0, steps=ALL),
        SteeringEdit(DOUBLE, 4, "scale", -3.0, steps=ALL),
        SteeringEdit(DOUBLE, 1, "clamp", 4.0, steps=ALL),
        SteeringEdit(SINGLE, 9, "project_out", 0.7, steps=(1, 3)),
    ]
    results = [latents(tiny_flux, list(order)) for order in itertools.permutations(edits)]
    assert all(torch.equal(bits(result), bits(results[0])) for result in results)


def test_several_edits_read_the_same_unedited_tokens(tiny_flux: FluxPipeline) -> None:
    feature = alive_feature(tiny_flux, DOUBLE, step=0)
    edits = [
        SteeringEdit(DOUBLE, feature, "ablate", 1.0, steps=ALL),
        SteeringEdit(DOUBLE, feature, "scale", 3.0, steps=ALL),
    ]
    seen: list[EditedCall] = []
    latents(tiny_flux, edits, on_edit=seen.append)
    x = seen[0].call.tokens
    # -z + 2z = z: had the second edit read the first one's result, it would have found nothing to scale
    expected = SAES[DOUBLE].encode(x)[..., feature, None] * SAES[DOUBLE].W_dec[feature] * SAES[DOUBLE].input_scale
    assert expected.any()
    torch.testing.assert_close(seen[0].delta, expected, rtol=1e-5, atol=1e-6)


def test_an_edit_in_a_region_leaves_the_acts_elsewhere_untouched(tiny_flux: FluxPipeline) -> None:
    region = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    inside = torch.tensor(region, dtype=torch.bool).flatten()
    seen: list[EditedCall] = []
    latents(tiny_flux, [SteeringEdit(DOUBLE, 2, "add", 5.0, steps=(1, 2), region=region)], on_edit=seen.append)
    assert torch.equal(bits(seen[1].edited[:, ~inside]), bits(seen[1].call.tokens[:, ~inside]))
    assert (seen[1].delta[:, inside] != 0).any(dim=-1).all()


@given(edits=st.lists(st.sampled_from([0, 1, 2, 3, 7]), min_size=1, max_size=4))
@settings(max_examples=10, deadline=None)
def test_a_flat_list_equals_the_same_list_for_every_item(tiny_flux: FluxPipeline, edits: list[int]) -> None:
    flat = [SteeringEdit(DOUBLE, feature, "add", 1.5, steps=(2, 4)) for feature in edits]
    torch.testing.assert_close(
        latents(tiny_flux, flat, n=2), latents(tiny_flux, [flat, flat], n=2), rtol=1e-5, atol=1e-5
    )


def test_without_steps_an_edit_acts_where_its_sae_was_trained(tiny_flux: FluxPipeline) -> None:
    with capture(tiny_flux, [DOUBLE]) as captured:
        latents(tiny_flux)
    sigmas = [captured.sigma(step) for step in captured.steps]
    sae = random_sae().with_trained_on(trained_on(sigmas=(sigmas[1], sigmas[2])))
    edit = SteeringEdit(DOUBLE, 2, "add", 3.0)
    seen: list[EditedCall] = []
    latents(tiny_flux, [edit], saes={DOUBLE: sae}, on_edit=seen.append)
    assert [bool(call.delta.any()) for call in seen] == [False, True, True, False]
    assert edit_window(edit, sae, sigmas) == (1, 3)


def test_a_direction_may_take_the_place_of_the_decoder_row(tiny_flux: FluxPipeline) -> None:
    edit = SteeringEdit(DOUBLE, 2, "add", 3.0, steps=ALL)
    other = torch.nn.functional.normalize(torch.arange(1.0, D_MODEL + 1), dim=0)
    seen: list[EditedCall] = []
    latents(tiny_flux, [[edit], [edit]], n=2, direction_of=lambda _, item: other if item else None, on_edit=seen.append)
    own, control = seen[0].delta[0, 0], seen[0].delta[1, 0]
    assert torch.cosine_similarity(own, SAES[DOUBLE].W_dec[2], dim=0) > 0.9999
    assert torch.cosine_similarity(control, other, dim=0) > 0.9999
    torch.testing.assert_close(own.norm(), control.norm())


# Hooks, faults and refusals


def n_hooks(pipe: FluxPipeline) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.transformer.modules())


class Cancelled(Exception):
    pass


def cancel(call: EditedCall) -> None:
    raise Cancelled


def test_hooks_are_gone_after_use_error_and_cancel(tiny_flux: FluxPipeline) -> None:
    edits = [SteeringEdit(DOUBLE, 0, "add", 1.0, steps=ALL), SteeringEdit(SINGLE, 0, "add", 1.0, steps=ALL)]
    plain, before = latents(tiny_flux), n_hooks(tiny_flux)
    latents(tiny_flux, edits)
    assert n_hooks(tiny_flux) == before
    with pytest.raises(Cancelled):
        latents(tiny_flux, edits, on_edit=cancel)
    assert n_hooks(tiny_flux) == before
    assert torch.equal(latents(tiny_flux), plain)


def refused(pipe: FluxPipeline, edits: Sequence[object], match: str, **options: object) -> None:
    """The edits are refused on entering, or before a transformer block has run."""
    ran: list[object] = []
    with (
        block_hooks(pipe, {HookPoint.parse("transformer_blocks.0"): ran.append}),
        pytest.raises(FluxSaeError, match=match),
    ):
        latents(pipe, edits, **options)
    assert not ran


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (SteeringEdit(DOUBLE, 48, "scale", 2.0, steps=ALL), "feature is 48.*0 to 47"),
        (SteeringEdit("layer2", 0, "scale", 2.0, steps=ALL), "no SAE for hook point transformer_blocks.2.ff"),
        (SteeringEdit(DOUBLE, 0, "scale", 2.0, steps=(0, 5)), "schedule has 4 steps"),
        (SteeringEdit(DOUBLE, 0, "scale", 2.0, steps=ALL, region=[[1, 0], [0, 1]]), "2 rows of 2.*4 rows of 4"),
        (SteeringEdit(DOUBLE, 0, "scale", 2.0, steps=ALL, region=[[1] * 8] * 2), "2 rows of 8.*4 rows of 4"),
        (SteeringEdit(PLACES[3], 0, "scale", 2.0, steps=ALL, region=[[1] * 4] * 4), "text tokens"),
        (SteeringEdit(DOUBLE, 0, "scale", 2.0), "does not say at which noise levels"),
    ],
)
def test_edits_that_do_not_fit_are_refused_before_generation(tiny_flux: FluxPipeline, edit, match: str) -> None:
    refused(tiny_flux, [edit], match)
    refused(tiny_flux, [edit], match, settings=SETTINGS)


def test_an_absent_block_is_refused(tiny_flux: FluxPipeline) -> None:
    absent = HookPoint.parse("layer9")
    refused(
        tiny_flux,
        [SteeringEdit(absent, 0, "scale", 2.0, steps=ALL)],
        "no transformer_blocks.9",
        saes={absent: SAES[DOUBLE]},
    )


def test_an_sae_of_another_width_is_refused(tiny_flux: FluxPipeline) -> None:
    edit = SteeringEdit(DOUBLE, 0, "scale", 2.0, steps=ALL)
    refused(tiny_flux, [edit], "width 64.*gives 32", saes={DOUBLE: random_sae(d_model=64)})


@pytest.mark.parametrize("mode", ["add", "clamp"])
def test_a_mode_without_its_reference_is_refused(tiny_flux: FluxPipeline, mode: str) -> None:
    sae = random_sae()
    sae.reference_acts[5] = 0
    refused(tiny_flux, [SteeringEdit(DOUBLE, 5, mode, 2.0, steps=ALL)], "reference activation", saes={DOUBLE: sae})


def test_a_heatmap_region_of_an_unknown_reference_needs_threshold_zero(tiny_flux: FluxPipeline) -> None:
    sae = random_sae()
    sae.reference_acts[5] = 0
    edits = [SteeringEdit(DOUBLE, 5, "scale", 2.0, steps=ALL, region=HeatmapRegion(part)) for part in (0.5, 0.0)]
    refused(tiny_flux, edits[:1], "Use threshold 0", saes={DOUBLE: sae})
    latents(tiny_flux, edits[1:], saes={DOUBLE: sae})


def test_a_thousand_edits_are_refused_on_entering(tiny_flux: FluxPipeline) -> None:
    refused(tiny_flux, [SteeringEdit(DOUBLE, 0, "scale", 2.0, steps=ALL)] * 1000, "1000 edits")


def test_lists_that_do_not_match_the_batch_are_refused(tiny_flux: FluxPipeline) -> None:
    refused(tiny_flux, [[SteeringEdit(DOUBLE, 0, "scale", 2.0, steps=ALL)]] * 3, "3 lists.*batch of 2", n=2)


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("size", {"n_tokens": 64, "height": 64, "width": 64}, "32 x 32 pixels, not 64 x 64"),
        # As many tokens, on another grid.
        ("size", {"height": 16, "width": 64}, "32 x 32 pixels, not 16 x 64"),
        ("guidance_scale", {"guidance_scale": 1.0}, "guidance_scale is 3.5, not 1"),
        ("flux", {"flux_id": "black-forest-labs/FLUX.1-dev"}, "FLUX is tiny .* not black-forest-labs/FLUX.1-dev"),
        ("adapters", {"adapters": ("adapter 0123456789ab",)}, "adapters are none, not adapter 0123456789ab"),
        ("is_exact", {"is_exact": False}, "is_exact is True, not False"),
        ("max_sequence_length", {"max_sequence_length": 512}, "max_sequence_length is 8, not 512"),
        ("hookpoint", {"hookpoint": "transformer_blocks.0.ff"}, "SAE of transformer_blocks.0.ff"),
    ],
)
def test_an_sae_trained_elsewhere_is_refused_or_allowed_by_name(name: str, changes, match: str) -> None:
    tiny_flux = build_tiny_flux()
    tiny_flux.transformer.register_to_config(_name_or_path="tiny")
    latents(
        tiny_flux,
        [SteeringEdit(DOUBLE, 0, "add", 2.0, steps=ALL)],
        saes={DOUBLE: random_sae().with_trained_on(trained_on())},
    )
    saes = {DOUBLE: random_sae().with_trained_on(trained_on(**changes))}
    edit = SteeringEdit(DOUBLE, 0, "add", 2.0, steps=ALL)
    refused(tiny_flux, [edit], match, saes=saes)
    refused(tiny_flux, [edit], match, saes=saes, settings=SETTINGS)
    refused(tiny_flux, [edit], match, saes=saes, allow_mismatch=[n for n in MISMATCHES if n != name])
    latents(tiny_flux, [edit], saes=saes, allow_mismatch=[name])


def test_a_schedule_without_the_trained_noise_levels_is_refused(tiny_flux: FluxPipeline) -> None:
    saes = {DOUBLE: random_sae().with_trained_on(trained_on(sigmas=(0.111, 0.112)))}
    refused(tiny_flux, [SteeringEdit(DOUBLE, 0, "add", 2.0)], "none of this schedule's 4 steps", saes=saes)
