"""Distances of feature sets: closed forms, torchmetrics, streams and ranks, the published neighbourhood measures, and too few images."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from flowalign.core.randomness import generator
from flowalign.evaluate import distances
from flowalign.evaluate.distances import Moments, frechet_distance, manifold


def draw(name, *shape):
    return torch.randn(*shape, generator=generator("distances", name), dtype=torch.float64)


class Flatten(torch.nn.Module):
    """Features that are six of an image's numbers."""

    num_features = 6

    def forward(self, images):
        return images.flatten(1)[:, :6].double()


def test_the_distance_is_torchmetrics_own_from_the_same_features():
    real, fake = torch.rand(60, 3, 4, 4, generator=generator(0)), torch.rand(50, 3, 4, 4, generator=generator(1)).square()
    extractor = Flatten()
    metric = FrechetInceptionDistance(feature=extractor, input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert frechet_distance(Moments.of(extractor(fake)), Moments.of(extractor(real))) == pytest.approx(float(metric.compute()), rel=1e-9)


def test_streams_and_ranks_add_up_in_any_order():
    x, y = draw("x", 500, 8) + 100, draw("y", 400, 8) * 1.5 + 100
    whole = frechet_distance(Moments.of(x), Moments.of(y))
    parts = [Moments.of(x[rank::4]) for rank in range(4)]
    forwards, backwards = sum(parts[1:], parts[0]), sum(parts[-2::-1], parts[-1])
    for merged in (forwards, backwards):
        assert merged.num == 500
        assert frechet_distance(merged, Moments.of(y)) == pytest.approx(whole, abs=1e-9)


def test_a_large_mean_costs_no_digits():
    x = draw("x", 300, 3) * 0.01
    near, far = Moments.of(x), Moments.of(x[:100] + 1e4) + Moments.of(x[100:] + 1e4)
    assert torch.allclose(near.covariance(), far.covariance(), rtol=1e-6, atol=1e-12)


def test_a_set_is_at_distance_zero_of_itself_and_the_bias_of_few_images_is_positive():
    x = draw("x", 200, 16)
    assert frechet_distance(Moments.of(x), Moments.of(x)) == pytest.approx(0, abs=1e-9)
    few, many = (frechet_distance(Moments.of(draw("a", num, 16)), Moments.of(draw("b", num, 16))) for num in (50, 2000))
    assert few > 5 * many > 0


def test_neighbourhood_measures_are_the_published_ones():
    rng = np.random.default_rng(0)
    real, fake = torch.tensor(rng.normal(size=(500, 8))), torch.tensor(0.5 * rng.normal(size=(500, 8)))
    found = manifold(fake, real)
    assert (found.precision, found.recall, found.coverage) == (1.0, 0.224, 0.84)
    assert found.density == pytest.approx(2.2712, abs=1e-10)


def test_chunks_change_nothing(monkeypatch):
    x, y = draw("x", 100, 4), draw("y", 90, 4)
    whole = manifold(x, y, neighbours=3)
    monkeypatch.setattr(distances, "_ROWS", 7)
    assert manifold(x, y, neighbours=3) == whole


def test_a_collapsed_set_is_precise_and_covers_little():
    y = draw("y", 200, 4)
    found = manifold(y[:1] + 1e-3 * draw("x", 200, 4), y)
    assert found.precision == 1
    assert max(found.recall, found.coverage) < 0.1


def test_moments_are_kept_with_what_made_them(tmp_path):
    made = Moments.of(draw("x", 30, 4))
    made.save(tmp_path / "reference.safetensors", extractor="flatten", resize="none")
    again = Moments.load(tmp_path / "reference.safetensors", extractor="flatten", resize="none")
    assert again.num == 30
    assert torch.equal(again.mean, made.mean)
    assert torch.equal(again.scatter, made.scatter)
    with pytest.raises(ValueError, match="was made with resize 'none', needed 'bicubic'"):
        Moments.load(tmp_path / "reference.safetensors", extractor="flatten", resize="bicubic")
    (tmp_path / "broken.safetensors").write_bytes(b"not a file")
    with pytest.raises(ValueError, match="holds no moments"):
        Moments.load(tmp_path / "broken.safetensors", extractor="flatten", resize="none")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: frechet_distance(Moments.of(draw("x", 4, 4)), Moments.of(draw("y", 9, 4))),
            "features: got 4 images for features of 4 numbers",
        ),
        (lambda: frechet_distance(Moments.of(draw("x", 9, 4)), Moments.of(draw("y", 9, 3))), "needed the same extractor"),
        (lambda: Moments.of(draw("x", 9, 4)) + Moments.of(draw("y", 9, 3)), "needed the same extractor"),
        (lambda: Moments.of(torch.zeros(0, 4)), "at least one image"),
        (lambda: Moments.of(torch.full((2, 2), torch.nan)), "not finite"),
        (lambda: manifold(draw("x", 5, 4), draw("y", 9, 4)), "neighbours: got 5 for 5 and 9 rows"),
        (lambda: manifold(draw("x", 9, 4), draw("y", 9, 3)), "needed \\[image, d\\]"),
    ],
)
def test_too_few_images_and_other_extractors_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
