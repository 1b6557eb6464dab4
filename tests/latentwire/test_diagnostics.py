"""Diagnostics: incremental PCA equals the whole one, collapse is seen, and training is not disturbed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from stillhouse.runtime.errors import UserError
from stillhouse.studies.latentwire.channel import Channel
from stillhouse.studies.latentwire.curves import append_diagnostics, read_diagnostics
from stillhouse.studies.latentwire.diagnostics import Diagnostics, IncrementalPca, between_share
from tests.latentwire.tiny_readers import FAMILIES, make_families
from tests.latentwire.tiny_study import load_readers, run_settings

TEXTS = ["Ada has 3 apples.", "Ben buys 12 books and sells 5 of them to Chen.", "Dora has none."]


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Channel:
    run = run_settings()
    return Channel.build(run, load_readers(make_families(tmp_path_factory.mktemp("models")), run), seed=3)


def vectors(rows: int, seed: int) -> torch.Tensor:
    """Correlated vectors with a mean."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 3


def test_incremental_pca_equals_the_whole_one_while_no_component_is_dropped() -> None:
    rows, pca = vectors(50, seed=0), IncrementalPca(components=6)
    for part in rows.split([1, 7, 30, 12]):
        pca.update(part)
    whole = PCA().fit(rows.double().numpy())
    assert pca.explained == pytest.approx(whole.explained_variance_ratio_.cumsum(), abs=1e-6)
    assert pca.mean.numpy() == pytest.approx(whole.mean_)
    assert np.abs((pca.directions.numpy() * whole.components_).sum(axis=1)) == pytest.approx(np.ones(6), abs=1e-6)


def test_incremental_pca_knows_the_total_variance_when_components_are_dropped() -> None:
    rows, pca = vectors(400, seed=1), IncrementalPca(components=3)
    for part in rows.split(40):
        pca.update(part)
    assert pca.scatter == pytest.approx(400 * rows.double().var(dim=0, correction=0).sum().item())
    assert pca.explained == pytest.approx(
        PCA(3).fit(rows.double().numpy()).explained_variance_ratio_.cumsum(), abs=0.02
    )
    assert pca.share_inside(rows) == pytest.approx(pca.explained[-1], abs=0.02)


def test_vectors_without_variance_are_explained_whole() -> None:
    pca = IncrementalPca()
    pca.update(torch.ones(4, 3))
    assert set(pca.explained) == {1.0}


def test_latents_that_do_not_depend_on_the_text_have_no_variance_between_texts() -> None:
    positions = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    assert between_share(positions.expand(3, -1, -1)) == pytest.approx(0, abs=1e-12)
    assert between_share(torch.randn(3, 1, 5, generator=torch.Generator().manual_seed(1))) == pytest.approx(1)


def test_a_row_measures_what_the_readers_get(channel: Channel) -> None:
    row = Diagnostics(TEXTS)(channel.eval(), step=7)
    assert (row.step, row.texts, set(row.readers)) == (7, 3, set(FAMILIES))
    with torch.no_grad():
        latents = channel.encode(TEXTS)
        z = latents.message().double().numpy()  # texts, M, d_z
        assert row.latent_rms == pytest.approx(np.sqrt((z**2).mean()), rel=1e-5)
        assert row.latent_mean == pytest.approx(z.mean(), abs=1e-6)
        assert row.latent_std == pytest.approx(z.std(ddof=1), rel=1e-5)
        assert row.latent_abs_max == pytest.approx(np.abs(z).max(), rel=1e-6)
        between = z.var(axis=0).sum() / ((z - z.mean(axis=(0, 1))) ** 2).sum() * len(z)
        assert row.latent_between_share == pytest.approx(between, rel=1e-4) and 0 < between < 1
        spectrum = PCA().fit(z.reshape(-1, z.shape[-1])).explained_variance_ratio_.cumsum()
        assert row.latent_explained == pytest.approx(spectrum[: len(row.latent_explained)], abs=1e-4)
        for name, found in row.readers.items():
            reader, prefix = channel.reader(name), channel.prefix(name, latents)
            assert found.prefix_rms == pytest.approx(prefix.embeddings.square().mean().sqrt().item(), rel=1e-5)
            tokens = [token for text in TEXTS for token in reader.text_ids(text)]
            assert found.embedding_rms == pytest.approx(reader.embed(tokens).square().mean().sqrt().item(), rel=1e-5)
            first = reader.first_logits(reader.prompt_embeddings(prefix)).argmax(-1)
            assert found.distinct_first_tokens == len(set(first.tolist()))
            assert found.first_token_share == max(np.bincount(first.numpy())) / 3


def test_a_resumed_run_replaces_the_rows_that_come_after_it(channel: Channel, tmp_path: Path) -> None:
    path, look = tmp_path / "rows.jsonl", Diagnostics(TEXTS)
    for step in (2, 4, 5):
        append_diagnostics(path, look(channel, step))
    assert [row.step for row in read_diagnostics(path)] == [2, 4, 5]
    append_diagnostics(path, look(channel, 4))
    assert [row.step for row in read_diagnostics(path)] == [2, 4]
    path.write_text("{damaged\n")
    with pytest.raises(UserError, match=r"rows\.jsonl: cannot be read"):
        read_diagnostics(path)


def test_a_look_leaves_random_state_mode_and_gradients_as_they_were(channel: Channel) -> None:
    channel.train()
    state = torch.get_rng_state()
    Diagnostics(TEXTS)(channel, 1)
    assert torch.equal(state, torch.get_rng_state()) and channel.training
    assert all(parameter.grad is None for parameter in channel.parameters())
