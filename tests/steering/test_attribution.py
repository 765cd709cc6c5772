import pytest
import torch
from test_steering import DOUBLE, SAES, SINGLE
from tiny_flux import SETTINGS, build_tiny_flux

from fluxsae.errors import FluxSaeError
from fluxsae.flux import FluxPipeline, block_hooks, capture, embed_prompts
from fluxsae.flux.generation import denoise_to
from fluxsae.flux.latents import velocity
from fluxsae.steering.apply import steer
from fluxsae.steering.attribution import Effect, Explanation, Target, Word, content_words, explain
from fluxsae.steering.edits import SteeringEdit

PROMPT, SEED, STEP = "a red circle on a black background", 3, 2


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return build_tiny_flux()


@pytest.fixture(scope="module")
def feature(pipe: FluxPipeline) -> int:
    """The one that fires most at the later hook point."""
    return int(SAES[SINGLE].encode(tokens(pipe)).sum((0, 1)).argmax())


@pytest.fixture(scope="module")
def found(pipe: FluxPipeline, feature: int) -> Explanation:
    return explain(pipe, SAES, Target(SINGLE, feature, STEP), prompt=PROMPT, seed=SEED, limit=4, allow_mismatch=True)


def tokens(pipe: FluxPipeline, prompt: str = PROMPT, edits: tuple[SteeringEdit, ...] = (), *, place=SINGLE):
    """The tokens at one hook point when the last step alone sees another prompt or edits."""
    snapshot = denoise_to(pipe, PROMPT, seeds=SEED, settings=SETTINGS, step=STEP)
    with (
        capture(pipe, [place], [STEP], stop_early=True) as captured,
        steer(pipe, SAES, list(edits), allow_mismatch=True),
    ):
        velocity(pipe, snapshot.latents, embed_prompts(pipe, [prompt], SETTINGS), step=STEP, settings=SETTINGS)
    return captured.get(place, STEP)


def drive(pipe: FluxPipeline, feature: int, prompt: str = PROMPT, edits: tuple[SteeringEdit, ...] = ()) -> float:
    return float(Target(SINGLE, feature, STEP).drive(SAES[SINGLE], tokens(pipe, prompt, edits))[0])


def of_word(found: Explanation, text: str) -> Effect:
    return next(effect for effect in found.words if isinstance(effect.source, Word) and effect.source.text == text)


def test_a_word_s_measured_effect_is_what_the_prompt_without_it_takes_away(pipe, feature, found) -> None:
    without = drive(pipe, feature, "a circle on a black background")
    assert found.drive == pytest.approx(drive(pipe, feature), rel=1e-4)
    assert of_word(found, "red").measured == pytest.approx(found.drive - without, rel=1e-3, abs=1e-4)


def test_a_feature_s_measured_effect_is_what_its_ablation_takes_away(pipe, feature, found) -> None:
    place, source = found.features[0].source
    edit = SteeringEdit(place, source, "ablate", 1.0, steps=(STEP, STEP + 1))
    expected = drive(pipe, feature) - drive(pipe, feature, edits=(edit,))
    assert found.features[0].measured == pytest.approx(expected, rel=1e-2, abs=1e-4)


def test_a_predicted_effect_is_the_slope_of_the_drive(pipe, feature, found) -> None:
    small = 0.01
    for effect in found.features:
        place, source = effect.source
        edit = SteeringEdit(place, source, "ablate", small, steps=(STEP, STEP + 1))
        slope = (drive(pipe, feature) - drive(pipe, feature, edits=(edit,))) / small
        assert effect.predicted == pytest.approx(slope, rel=0.1, abs=2e-3)


def test_features_and_what_is_not_reconstructed_add_up_to_gradient_times_tokens(pipe, feature, found) -> None:
    # x = sum of features + error + constant, so moving all of x towards the constant moves the drive by their sum.
    sae, small = SAES[DOUBLE], 0.01
    constant = sae.decode(torch.zeros(sae.config.n_features))
    snapshot = denoise_to(pipe, PROMPT, seeds=SEED, settings=SETTINGS, step=STEP)

    def drive_at(share: float) -> float:
        with (
            capture(pipe, [SINGLE], [STEP], stop_early=True) as captured,
            block_hooks(pipe, {DOUBLE: lambda call: call.tokens + share * (constant - call.tokens)}),
        ):
            velocity(pipe, snapshot.latents, snapshot.embeddings, step=STEP, settings=SETTINGS)
        return float(Target(SINGLE, feature, STEP).drive(SAES[SINGLE], captured.get(SINGLE, STEP))[0])

    slope = (drive_at(0.0) - drive_at(small)) / small
    assert found.explained[DOUBLE] + found.unexplained[DOUBLE] == pytest.approx(slope, rel=0.05, abs=2e-3)


def test_one_token_is_explained_by_its_own_pre_activation(pipe, feature) -> None:
    found = explain(pipe, SAES, Target(SINGLE, feature, STEP, token=5), prompt=PROMPT, seed=SEED, allow_mismatch=True)
    assert found.drive == pytest.approx(float(SAES[SINGLE].pre_acts(tokens(pipe))[0, 5, feature]), rel=1e-4)


def test_an_explanation_of_the_earliest_hook_point_has_words_alone(pipe) -> None:
    found = explain(pipe, SAES, Target(DOUBLE, 3, STEP), prompt=PROMPT, seed=SEED, allow_mismatch=True)
    assert found.features == ()
    assert len(found.words) == len(content_words(PROMPT))


def test_each_occurrence_of_a_content_word_is_a_source() -> None:
    words = content_words("a small red star and a small cat")
    assert [(word.text, word.position) for word in words] == [
        ("small", 1), ("red", 2), ("star", 3), ("small", 6), ("cat", 7),
    ]  # fmt: skip


def test_nothing_stays_behind(pipe, found) -> None:
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.transformer.modules())
    assert hooks == 0
    assert all(parameter.requires_grad for parameter in pipe.transformer.parameters())


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (Target(SINGLE, 0, STEP, token=10_000), "token is 10000; this image has tokens 0 to 15"),
        (Target(SINGLE, 99_999, STEP), "99999"),
        (Target(SINGLE, 0, 99), "99"),
    ],
)
def test_what_is_not_there_is_refused_before_any_model_work(pipe, target: Target, said: str) -> None:
    with pytest.raises(FluxSaeError, match=said):
        explain(pipe, SAES, target, prompt=PROMPT, seed=SEED, allow_mismatch=True)
