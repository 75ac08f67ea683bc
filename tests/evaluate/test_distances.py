"""Distances of feature sets: closed forms, torchmetrics, streams and ranks, the published neighbourhood measures, and too few images."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from flowalign.core.randomness import generator
from flowalign.evaluate import neighbourhoods
from flowalign.evaluate.distances import Moments, frechet_distance, frechet_interval, manifold
from flowalign.evaluate.neighbourhoods import manifold_intervals


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
    prompt = [(7 * row) % 13 for row in range(100)]
    whole = manifold_intervals(x, y, prompt, neighbours=3)
    monkeypatch.setattr(neighbourhoods, "_ROWS", 20)
    parts = manifold_intervals(x, y, prompt, neighbours=3)
    assert all(vars(parts[name]) == pytest.approx(vars(whole[name]), rel=1e-12) for name in whole)
    assert manifold(x, y, neighbours=3) == manifold(x[torch.randperm(100, generator=generator(3))], y, neighbours=3)


def spread(values):
    mean = sum(values) / len(values)
    return (len(values) - 1) / len(values) * sum((value - mean) ** 2 for value in values)


@pytest.mark.parametrize("is_paired", [False, True])
def test_their_intervals_are_the_jackknife_written_out_with_reaches_held(is_paired):
    prompt = [row % 5 for row in range(24)]
    x, y = draw("x", 24, 2) * 0.7, draw("y", 24, 2)
    k = 2
    table = lambda a: torch.cdist(a, a).sort(1).values[:, k]  # noqa: E731
    near, reach_x, reach_y = torch.cdist(x, y), table(x), table(y)

    def measures(rows, columns):
        inside, holds = near[rows][:, columns] < reach_y[columns], near[rows][:, columns] < reach_x[rows, None]
        return {
            "precision": float(inside.any(1).double().mean()),
            "recall": float(holds.any(0).double().mean()),
            "density": float(inside.double().sum(1).mean() / k),
            "coverage": float(inside.any(0).double().mean()),
        }

    everyone = list(range(24))
    found = manifold_intervals(x, y, prompt, neighbours=k, is_paired=is_paired)
    without_x = [measures([row for row in everyone if prompt[row] != p], everyone) for p in range(5)]
    without_y = [measures(everyone, [row for row in everyone if row != column]) for column in everyone]
    for name, mean in measures(everyone, everyone).items():
        of_y = [one[name] for one in without_y]
        if is_paired:  # to first order, what a prompt's reference images add is the sum of what each does
            added = [sum(of_y[row] - mean for row in everyone if prompt[row] == p) for p in range(5)]
            variance = spread([one[name] + more for one, more in zip(without_x, added, strict=True)])
        else:
            variance = spread([one[name] for one in without_x]) + spread(of_y)
        assert found[name].mean == pytest.approx(mean, abs=1e-12)
        reach = 1.959964 * variance**0.5
        assert found[name].low == pytest.approx(max(0.0, mean - reach), abs=1e-6)
        assert found[name].high == pytest.approx(min(1.0, mean + reach) if name != "density" else mean + reach, abs=1e-6)
        assert reach > 0
    assert manifold_intervals(x, y, [row % 2 for row in range(24)])["recall"].low is None


def sets(seed, num_prompts=60, each=3, dim=5):
    """Images that are alike within a prompt, and others of another law."""
    x = (draw(f"c{seed}", num_prompts, 1, dim) + 0.5 * draw(f"x{seed}", num_prompts, each, dim)).flatten(0, 1)
    return x, 1.3 * draw(f"y{seed}", 150, dim) + 0.4


def test_intervals_are_as_wide_as_new_prompts_images_and_references_make_the_measures_vary():
    prompt = torch.arange(60).repeat_interleave(3).tolist()
    found = {}
    for seed in range(120):
        x, y = sets(seed)
        measured = {"frechet": frechet_interval(x, y, prompt), **manifold_intervals(x, y, prompt)}
        for name, interval in measured.items():
            found.setdefault(name, []).append((interval.mean, (interval.high - interval.low) / (2 * 1.959964)))
    for name, pairs in found.items():
        means, errors = torch.tensor(pairs, dtype=torch.float64).unbind(1)
        # Reaches are held, and ends clipped to the measure's range; 120 draws know their spread to 7 %.
        assert 0.75 < float(errors.mean() / means.std()) < 1.5, name


def test_the_distances_interval_is_that_of_leaving_prompts_out():
    x, y = sets(0, num_prompts=100)
    prompt = torch.arange(100).repeat_interleave(3)
    found = frechet_interval(x, y, prompt.tolist())
    assert found.mean == frechet_distance(Moments.of(x), Moments.of(y))
    without_x = [frechet_distance(Moments.of(x[prompt != p]), Moments.of(y)) for p in range(100)]
    without_y = [frechet_distance(Moments.of(x), Moments.of(y[torch.arange(150) != row])) for row in range(150)]
    assert found.high - found.mean == pytest.approx(1.959964 * (spread(without_x) + spread(without_y)) ** 0.5, rel=0.1)
    same = frechet_interval(x, x, prompt.tolist(), is_paired=True)
    assert same.mean == pytest.approx(0, abs=1e-9)
    assert same.high == pytest.approx(0, abs=1e-6)
    assert frechet_interval(x, y, [0, 1] * 150).low is None


def test_directions_in_which_nothing_varies_change_no_interval():
    x, y = sets(1)
    prompt = torch.arange(60).repeat_interleave(3).tolist()
    flat = [torch.cat([rows, torch.ones(len(rows), 2, dtype=torch.float64)], 1) for rows in (x, y)]
    assert vars(frechet_interval(*flat, prompt)) == pytest.approx(vars(frechet_interval(x, y, prompt)), rel=1e-6)


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
