"""Linear edits in closed form, on planted tokens whose answer is known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxsae.flux.hookpoints import HookPoint
from fluxsae.laboratory.moments import ConceptMoments, others_of
from fluxsae.laboratory.truths import CONCEPTS, Concept
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.apply import edit_delta
from fluxsae.steering.edits import SteeringEdit

PLACE = HookPoint.parse("layer1")
RED, BLUE, GREEN = (Concept("colour", value) for value in ("red", "blue", "green"))


def planted(*, d: int = 8, seed: int = 0) -> tuple[ConceptMoments, dict[Concept, Tensor]]:
    """Tokens of three colours with known means and correlated noise, raw units off the normalised ones."""
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(SaeConfig(architecture="topk", d_model=d, n_features=24, k=4), seed=1)
    sae.input_mean.copy_(torch.randn(d, generator=generator))
    sae.input_scale.fill_(2.5)
    sae.reference_acts.fill_(1.0)
    mix = torch.randn(d, d, generator=generator)
    tokens = {c: torch.randn(400, d, generator=generator) @ mix + 3 * torch.randn(d, generator=generator)
              for c in (RED, BLUE, GREEN)}  # fmt: skip
    moments = ConceptMoments(sae, (0,), (0.5,))
    for concept, x in tokens.items():
        covers = np.zeros((len(CONCEPTS), len(x)))
        covers[CONCEPTS.index(concept)] = 1
        moments.update(x[None], covers)
    return moments, tokens


def edited(sae: SparseAutoencoder, x: Tensor, *, share: float = 1.0) -> Tensor:
    edits = [SteeringEdit(PLACE, f, "scale", 1 - share, steps=(0, 1)) for f in range(sae.config.n_features)]
    return x + sum(edit_delta(edit, sae, x[None])[0] for edit in edits)


@pytest.mark.parametrize("name", ["replacement_sae", "leace_sae"])
def test_a_linear_edit_moves_every_value_to_the_mean_of_the_wanted_one(name: str) -> None:
    moments, tokens = planted()
    sae = getattr(moments, name)(RED, wanted=True)
    for concept, x in tokens.items():
        moved = edited(sae, x).mean(0)
        assert torch.allclose(moved, tokens[RED].mean(0), atol=1e-3), concept


@pytest.mark.parametrize("name", ["replacement_sae", "leace_sae"])
def test_suppressing_moves_the_concept_to_the_mean_of_the_others_and_no_probe_tells_them(name: str) -> None:
    moments, tokens = planted()
    sae = getattr(moments, name)(RED, wanted=False)
    others = torch.cat([tokens[BLUE], tokens[GREEN]])
    red, rest = edited(sae, tokens[RED]), edited(sae, others)
    assert torch.allclose(red.mean(0), others.mean(0), atol=1e-3)
    assert torch.allclose(rest.mean(0), others.mean(0), atol=1e-3)


def test_leace_changes_tokens_less_than_the_orthogonal_projection_in_their_own_metric() -> None:
    moments, tokens = planted()
    every = torch.cat(list(tokens.values()))
    centred = (every - every.mean(0)).double()
    whiten = torch.linalg.inv(centred.T @ centred / len(every))
    cost = {}
    for name in ("replacement_sae", "leace_sae"):
        delta = (edited(getattr(moments, name)(RED, wanted=True), every) - every).double()
        cost[name] = float(((delta @ whiten) * delta).sum(1).mean())
    assert cost["leace_sae"] < cost["replacement_sae"]


def test_the_difference_is_that_of_tokens_of_the_same_kind() -> None:
    sae = SparseAutoencoder(SaeConfig(architecture="l1", d_model=2, n_features=2))
    moments = ConceptMoments(sae, (0,), (0.5,))
    covers = np.zeros((len(CONCEPTS), 3))
    covers[CONCEPTS.index(RED), 0] = 1
    covers[CONCEPTS.index(BLUE), 1] = 1  # token 2 is background: no colour at all
    moments.update(torch.tensor([[[3.0, 1.0], [1.0, 5.0], [100.0, 100.0]]]), covers)
    assert moments.difference(RED).tolist() == [2.0, -4.0]
    assert moments.is_known(RED)
    assert not moments.is_known(Concept("texture", "dotted"))
    assert CONCEPTS.index(RED) not in others_of(RED)


def test_telling_features_are_those_whose_mean_acts_differ_most() -> None:
    sae = SparseAutoencoder(SaeConfig(architecture="l1", d_model=3, n_features=3), seed=None).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(3))
    sae.W_dec.copy_(torch.eye(3))
    sae.reference_acts.copy_(torch.tensor([1.0, 1.0, 0.0]))
    moments = ConceptMoments(sae, (0,), (0.5,))
    covers = np.zeros((len(CONCEPTS), 2))
    covers[CONCEPTS.index(RED), 0] = covers[CONCEPTS.index(BLUE), 1] = 1
    moments.update(torch.tensor([[[1.0, 5.0, 9.0], [1.5, 0.0, 0.0]]]), covers)
    assert moments.telling_features(RED, limit=3) == (1, 0)  # 2 differs most, but its reference is unknown
    own, others = moments.levels(RED)
    assert own.tolist() == [[1.0, 5.0, 9.0]]
    assert others.tolist() == [[1.5, 0.0, 0.0]]


def test_mean_acts_are_kept_step_by_step_and_each_step_has_its_window() -> None:
    sae = SparseAutoencoder(SaeConfig(architecture="l1", d_model=1, n_features=1), seed=None).requires_grad_(False)
    sae.W_enc.fill_(1.0)
    moments = ConceptMoments(sae, (6, 10, 18), (0.9, 0.7, 0.2))
    covers = np.zeros((len(CONCEPTS), 2))
    covers[CONCEPTS.index(RED), 0] = covers[CONCEPTS.index(BLUE), 1] = 1
    moments.update(torch.tensor([[[1.0], [4.0]], [[2.0], [5.0]], [[3.0], [6.0]]]), covers)
    own, others = moments.levels(RED)
    assert own.flatten().tolist() == [1.0, 2.0, 3.0]
    assert others.flatten().tolist() == [4.0, 5.0, 6.0]
    assert moments.windows(4, 20) == [(4, 8), (8, 14), (14, 20)]
    assert moments.windows(9, 12) == [(9, 9), (9, 12), (12, 12)]
