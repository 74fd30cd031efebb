"""Embeddings and positions against PyTorch's own and the paper's formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support.embeddings import InputEmbedding, SkipGram, nearest, sinusoidal_positions


def test_sinusoidal_positions_are_the_papers_formula():
    waves = sinusoidal_positions(300, 64)
    for t in (0, 1, 17, 299):
        for i in (0, 1, 15, 31):
            angle = t / 10_000 ** (2 * i / 64)
            assert waves[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-4)
            assert waves[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-4)
    with pytest.raises(ValueError, match="d_model=7 is odd"):
        sinusoidal_positions(4, 7)


def test_input_embedding_is_the_sum_of_two_of_pytorchs():
    model, tokens, positions = InputEmbedding(50, 8, 16), nn.Embedding(50, 16), nn.Embedding(8, 16)
    tokens.weight, positions.weight = model.tok_emb.weight, model.pos_emb.weight
    ids = torch.randint(50, (3, 5))
    assert torch.equal(model(ids), tokens(ids) + positions(torch.arange(5)))
    later = torch.tensor([3, 7, 0, 0, 1])
    assert torch.equal(model(ids, later), tokens(ids) + positions(later))
    with pytest.raises(ValueError, match="9 tokens exceed context_length=8"):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_dropout_only_in_training():
    model = InputEmbedding(50, 8, 16, dropout=0.5)
    ids = torch.randint(50, (3, 5))
    assert (model(ids) == 0).float().mean() > 0.3
    assert torch.equal(model.eval()(ids), model(ids))


def test_skip_gram_loss_is_binary_cross_entropy():
    torch.manual_seed(0)
    model = SkipGram(20, 8, weight=3.0)
    nn.init.normal_(model.context.weight)
    centers, neighbors, randoms = (
        torch.tensor([1, 2]),
        torch.tensor([3, 4]),
        torch.tensor([5, 6, 7]),
    )
    v, u = model.center.weight, model.context.weight
    true = (v[centers] * u[neighbors]).sum(-1)
    false = v[centers] @ u[randoms].T
    bce = F.binary_cross_entropy_with_logits
    expected = bce(true, torch.ones(2)) + 3.0 * bce(false, torch.zeros(2, 3))
    assert model(centers, neighbors, randoms).item() == pytest.approx(expected.item(), abs=1e-6)


def test_nearest_is_a_sort_by_cosine():
    torch.manual_seed(0)
    vectors, query = torch.randn(30, 5) * torch.rand(30, 1), torch.randn(5)
    cosine = F.cosine_similarity(vectors, query[None])
    order = [i for i in cosine.argsort(descending=True).tolist() if i not in (3, 4)]
    found = nearest(vectors, query, 6, exclude=[3, 4])
    assert [i for i, _ in found] == order[:6]
    assert [c for _, c in found] == pytest.approx(cosine[order[:6]].tolist())
