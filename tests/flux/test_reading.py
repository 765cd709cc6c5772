"""Pictures read in one pass: the activations that FLUX has on its way to that very picture, and nothing run beyond."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tiny_flux import D_MODEL, SETTINGS, build_tiny_flux

from fluxsae import FluxSaeError, RunFolder, SparseAutoencoder, capture, generate, read_picture
from fluxsae.flux import (
    BlockCall,
    FluxPipeline,
    Snapshot,
    block_hooks,
    embed_prompts,
    encode_images,
    generate_from,
    initial_noise,
    schedule_sigmas,
)
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.miniature import miniature_path
from fluxsae.miniature.scenes import Scene, object_mask, place_object, render_scene

PROMPT = "a red circle"
PLACES = ["layer1", "transformer_blocks.1", "single_transformer_blocks.0"]


def picture(seed: int = 0, *, width: int = 32, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def with_kl_autoencoder(pipe: FluxPipeline) -> FluxPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
        pipe.vae = AutoencoderKL(
            latent_channels=4, block_out_channels=(8, 8, 8), norm_num_groups=4, layers_per_block=1,
            use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.36, shift_factor=0.12, **blocks,
        ).eval()  # fmt: skip
    return pipe


def test_a_picture_whose_activations_are_no_numbers_is_refused_by_step(tiny_flux: FluxPipeline) -> None:
    def spoil(call: BlockCall) -> torch.Tensor:
        return call.tokens / 0

    where = r"At step 2 of transformer_blocks.1.ff, the activations of picture 0 hold NaN"
    with (
        block_hooks(tiny_flux, {HookPoint.parse("layer0"): spoil}),
        pytest.raises(FluxSaeError, match=where),
    ):
        read_picture(tiny_flux, picture(), hookpoints=["layer1"], steps=[2])


@pytest.mark.parametrize("step", [0, 2])
def test_a_read_equals_the_pass_that_the_pipeline_itself_makes_there(tiny_flux: FluxPipeline, step: int) -> None:
    settings = replace(SETTINGS, width=48)
    sigma = schedule_sigmas(tiny_flux, settings)[step]
    noise = initial_noise(tiny_flux, [5], settings)
    noisy = (1 - sigma) * encode_images(tiny_flux, [picture(width=48)]) + sigma * noise
    start = Snapshot(noisy, step, settings, embed_prompts(tiny_flux, [PROMPT], settings))
    with capture(tiny_flux, PLACES, [step], stop_early=True) as expected:
        generate_from(tiny_flux, start, output_type="latent")
    read = read_picture(tiny_flux, picture(width=48), prompt=PROMPT, hookpoints=PLACES, steps=[step], seeds=5)
    assert read.steps == [step]
    assert read.sigma(step) == expected.sigma(step) == sigma
    for place in PLACES:
        torch.testing.assert_close(read.get(place, step), expected.get(place, step), rtol=1e-4, atol=1e-5)


def test_at_pure_noise_every_picture_reads_as_the_generation_of_that_seed(tiny_flux: FluxPipeline) -> None:
    with capture(tiny_flux, ["layer1"], [0], stop_early=True) as generated:
        generate(tiny_flux, PROMPT, seeds=7, settings=SETTINGS)
    read = read_picture(tiny_flux, picture(), prompt=PROMPT, hookpoints=["layer1"], steps=[0], seeds=7)
    assert torch.equal(read.get("layer1", 0), generated.get("layer1", 0))


def test_steps_and_batch_mates_change_nothing(tiny_flux: FluxPipeline) -> None:
    pictures = [picture(seed) for seed in range(3)]
    together = read_picture(
        tiny_flux, pictures, prompt=["", PROMPT, ""], hookpoints=PLACES, steps=[3, 1], seeds=[4, 5, 6]
    )
    assert together.steps == [1, 3]
    alone = read_picture(tiny_flux, pictures[1], prompt=PROMPT, hookpoints=["layer1"], steps=[3], seeds=5)
    torch.testing.assert_close(together.get("layer1", 3)[1:2], alone.get("layer1", 3), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together.get("layer1", 3)[:1], alone.get("layer1", 3))


def test_the_caption_the_picture_and_the_seed_each_matter(tiny_flux: FluxPipeline) -> None:
    def read(image: Image.Image, **arguments: Any) -> torch.Tensor:
        return read_picture(tiny_flux, image, hookpoints=["layer1"], steps=[2], **arguments).get("layer1", 2)

    plain = read(picture())
    assert torch.equal(plain, read(picture(), prompt="", seeds=0))
    for other in (read(picture(1)), read(picture(), prompt=PROMPT), read(picture(), seeds=1)):
        assert not torch.allclose(plain, other)


def test_each_step_is_one_pass_that_ends_after_the_last_wanted_block(tiny_flux: FluxPipeline) -> None:
    ran: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: ran.append(name)

    transformer = tiny_flux.transformer
    modules = {
        "first": transformer.transformer_blocks[0], "last": transformer.transformer_blocks[1].ff,
        "later": transformer.transformer_blocks[2], "head": transformer.proj_out, "decoder": tiny_flux.vae.decoder,
    }  # fmt: skip
    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        read_picture(tiny_flux, picture(), hookpoints=["layer0", "layer1"], steps=[1, 3])
    finally:
        for handle in handles:
            handle.remove()
    assert ran == ["first", "last"] * 2


def test_with_a_sink_every_call_goes_there_and_nothing_is_held(tiny_flux: FluxPipeline) -> None:
    calls: list[BlockCall] = []
    read = read_picture(tiny_flux, picture(), hookpoints=["layer0", "layer1"], steps=[1, 3], sink=calls.append)
    assert [(str(call.hookpoint)[-4], call.step, call.n_steps) for call in calls] == [
        ("0", 1, 4), ("1", 1, 4), ("0", 3, 4), ("1", 3, 4),
    ]  # fmt: skip
    with pytest.raises(FluxSaeError, match="No activations"):
        read.get("layer1", 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance_embeds", [True, False])
@pytest.mark.parametrize("adapt", [with_kl_autoencoder, lambda pipe: pipe], ids=["kl", "tiny"])
def test_either_autoencoder_any_shape_and_dtype(
    adapt: Callable[[FluxPipeline], FluxPipeline], guidance_embeds: bool, dtype: torch.dtype
) -> None:
    pipe = adapt(build_tiny_flux(guidance_embeds=guidance_embeds)).to(dtype)
    read = read_picture(pipe, picture(width=40, height=24), hookpoints=PLACES, steps=[1, 3])
    for place in PLACES:
        tokens = read.get(place, 3)
        assert tokens.shape == (1, 5 * 3, D_MODEL)
        assert tokens.dtype == dtype
        assert tokens.isfinite().all()


def test_a_read_inside_somebodys_capture_that_ends_early_ends_with_it(tiny_flux: FluxPipeline) -> None:
    read = None
    with capture(tiny_flux, ["layer0"], [2], stop_early=True) as outer:
        read = read_picture(tiny_flux, picture(), hookpoints=["layer1"], steps=[2])
    assert read is None
    assert outer.steps == [2]


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        ([], {}, "No pictures given"),
        ([picture().convert("L")], {}, "mode L; FLUX reads RGB.*open_picture"),
        ([picture(), picture(width=40)], {}, "must have one size, these have 32 x 32, 40 x 32"),
        ([picture(width=36)], {}, "width=36 does not fit"),
        ([picture(width=40)], {"settings": SETTINGS}, "40 x 32 pixels and the settings say 32 x 32.*fit_picture"),
        ([picture()], {"prompt": ["a", "b"]}, "1 pictures but 2 prompts"),
        ([picture()], {"prompt": "  "}, "prompt is blank"),
        ([picture()], {"prompt": "x" * 2001}, "2001 characters"),
        ([picture()], {"seeds": [1, 2]}, "1 pictures but 2 seeds"),
        ([picture()], {"seeds": -1}, "seed=-1"),
        ([picture()], {"steps": [4]}, "step=4 is outside the schedule"),
        ([picture()], {"steps": []}, "at least one step"),
        ([picture()], {"hookpoints": ["layer9"]}, "has no transformer_blocks.9"),
        ([picture()], {"hookpoints": "layer1"}, "given as a list"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tiny_flux: FluxPipeline, images: list[Image.Image], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(FluxSaeError, match=message):
        read_picture(tiny_flux, images, **{"hookpoints": ["layer1"], "steps": [1], **arguments})


def test_features_named_after_a_thing_fire_where_a_drawn_one_is(miniature: FluxPipeline) -> None:
    run = RunFolder(miniature_path("run"))
    hookpoint = run.hookpoints()[-1]
    table, step = run.load_features(hookpoint), run.load_info().steps[-1]
    labels, maxima = table.column("label"), torch.from_numpy(table.column("max_act")).clamp(min=1e-6).float()
    things = ["star", "cat", "house", "heart"]
    sae = SparseAutoencoder.from_pretrained(run.sae_path(hookpoint))
    rng = np.random.default_rng(0)
    scenes = [
        Scene((place_object(rng, position=where, thing=thing, size="large", colour="blue", texture="solid"),), "gray")
        for thing in things
        for where in ("left", "right", "center", "top")
    ]
    pictures = [Image.fromarray(render_scene(scene)) for scene in scenes]
    captions = [f"a large solid blue {scene.objects[0].thing} on a gray background" for scene in scenes]
    read = read_picture(miniature, pictures, prompt=captions, hookpoints=[hookpoint], steps=[step])
    acts = sae.encode(read.get(hookpoint, step)).detach() / maxima  # images, tokens, features
    by_thing = torch.stack([acts[..., labels == thing].sum(-1) for thing in things], dim=-1)
    n_right = int((by_thing.amax(1).argmax(1) == torch.arange(4).repeat_interleave(4)).sum())
    assert n_right >= 10  # of 16; chance gives 4, the committed run 11
    n_inside = 0
    for i, scene in enumerate(scenes):
        token = int(by_thing[i, :, i // 4].argmax())
        n_inside += bool(object_mask(scene.objects[0]).reshape(8, 16, 8, 16)[token // 8, :, token % 8].any())
    assert n_inside >= 14, n_inside
