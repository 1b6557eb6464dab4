"""Adapters: each example's prefix has the calibrated size, whatever Z is and whatever else is in the batch."""

from __future__ import annotations

import inspect

import pytest
import torch

from stillhouse.studies.latentwire.adapters import Adapter, root_mean_square
from stillhouse.studies.latentwire.prompt import LayerShape
from stillhouse.studies.latentwire.run_settings import AdapterSettings


def adapter(layers: LayerShape | None = None, **settings: object) -> Adapter:
    torch.manual_seed(0)
    return Adapter(AdapterSettings.model_validate(settings), dimension=8, hidden_size=12, rms=0.25, layers=layers)


@pytest.mark.parametrize("calibration", ["embed_rms", "fixed", "train_stats"])
def test_every_examples_prefix_has_the_calibrated_size(calibration):
    module = adapter(calibration=calibration)
    latents = torch.randn(3, 5, 8) * torch.tensor([0.1, 1.0, 30.0])[:, None, None]
    prefix = module.calibrate(module(latents))
    assert torch.allclose(root_mean_square(prefix), torch.full((3,), 0.25), rtol=1e-5)
    assert torch.allclose(module.calibrate(module(latents[:1])), prefix[:1], atol=1e-6)
    with torch.no_grad():
        module.scale.fill_(2.0)
    assert torch.allclose(root_mean_square(module.calibrate(module(latents))), torch.full((3,), 0.5), rtol=1e-5)


def test_without_calibration_the_prefix_comes_as_it_is():
    module = adapter(calibration="none")
    latents = torch.randn(2, 5, 8)
    assert torch.equal(module.calibrate(module(latents)), module(latents))


def test_the_mlp_stands_beside_a_skip():
    module = adapter(calibration="none")
    latents = torch.randn(2, 5, 8)
    normed = torch.nn.functional.layer_norm(latents, (8,))
    assert torch.allclose(module(latents), normed @ module.skip.weight.T + module.mlp(normed), atol=1e-5)


def test_film_begins_as_the_identity_and_then_depends_on_the_example():
    plain, film = adapter(), adapter(film=True)
    film.load_state_dict(plain.state_dict(), strict=False)
    latents = torch.randn(2, 5, 8)
    assert torch.allclose(plain(latents), film(latents))
    torch.nn.init.normal_(film.film.weight)
    others = latents.clone()
    others[0, 1:] += torch.randn(4, 8)
    assert not torch.allclose(film(latents)[0, 0], film(others)[0, 0], atol=1e-3)
    assert torch.allclose(film(latents)[1], film(others)[1])


def test_a_deep_prefix_has_keys_and_values_for_every_layer():
    shape = LayerShape(layers=3, heads=2, head_dimension=4)
    module = adapter(layers=shape)
    latents = torch.randn(2, 5, 8)
    states = module.layer_states(latents)
    assert len(states) == 3
    assert all(tensor.shape == (2, 2, 5, 4) for layer in states for tensor in layer)
    flat = module.deep(module.norm(latents))
    joined = torch.stack([torch.stack(layer) for layer in states])  # layers, 2, batch, heads, M, head dimension
    assert torch.equal(joined.permute(2, 4, 0, 1, 3, 5).reshape(2, 5, -1), flat)
    assert adapter().layer_states(latents) == ()


def test_dropped_vectors_have_no_part_in_what_the_others_become():
    """FiLM's mean, the calibration and a deep prefix are those of the kept vectors alone."""
    module = adapter(film=True, layers=LayerShape(layers=2, heads=1, head_dimension=4))
    torch.nn.init.normal_(module.film.weight)
    latents, kept = torch.randn(2, 5, 8), [0, 2, 3]
    mask = torch.tensor([[1, 0, 1, 1, 0]]).expand(2, -1)
    alone, masked = module(latents[:, kept]), module(latents, mask)
    assert torch.allclose(masked[:, kept], alone, atol=1e-5)
    assert torch.allclose(module.calibrate(masked, mask)[:, kept], module.calibrate(alone), atol=1e-5)
    for layer, expected in zip(module.layer_states(latents, mask), module.layer_states(latents[:, kept]), strict=True):
        for states, own in zip(layer, expected, strict=True):
            assert torch.allclose(states[:, :, kept], own, atol=1e-5)


def test_nothing_but_latents_reaches_an_adapter():
    """An adapter that were told the gold answer's length, as the published one is, would have another argument."""
    for method in (Adapter.forward, Adapter.calibrate, Adapter.layer_states):
        assert list(inspect.signature(method).parameters) in (["self", "latents", "mask"], ["self", "prefix", "mask"])
