"""Distances, diversity and pixel statistics."""

import pytest
import torch
from torchmetrics.image.kid import maximum_mean_discrepancy, poly_kernel

import flowalign.shapes as shapes
from flowalign.evaluate.drift import COLUMNS, measure_drift
from flowalign.evaluate.fidelity import (
    RandomFeatures,
    features_of,
    kernel_distance,
    pixel_statistics,
    relative_diversity,
    vendi,
    within_prompt_distance,
    within_prompt_vendi,
)


def _normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_kernel_distance_equals_the_mean_over_pairs_of_prompts_written_out():
    x, y, prompt = _normal(7, 5), _normal(7, 5, seed=1) + 0.3, [4, 4, 9, 2, 2, 2, 7]
    rows = [[i for i, p in enumerate(prompt) if p == name] for name in (2, 4, 7, 9)]

    def k(a, b):
        return ((a @ b.T / 5 + 1) ** 3).mean()

    pairs = [(p, q) for p in range(4) for q in range(4) if p != q]
    expected = sum(
        k(x[rows[p]], x[rows[q]]) + k(y[rows[p]], y[rows[q]]) - k(x[rows[p]], y[rows[q]]) - k(x[rows[q]], y[rows[p]]) for p, q in pairs
    ) / len(pairs)
    assert kernel_distance(x, y, prompt).mean == pytest.approx(float(expected), rel=1e-12)


def test_with_one_image_per_prompt_it_differs_from_torchmetrics_only_by_the_pairs_of_one_prompt():
    x, y = _normal(12, 5), _normal(12, 5, seed=1) + 0.3
    cross = poly_kernel(x, y)
    other_prompts = (cross.sum() - cross.trace()) / (12 * 11)
    theirs = maximum_mean_discrepancy(poly_kernel(x, x), cross, poly_kernel(y, y))
    expected = theirs + 2 * cross.mean() - 2 * other_prompts
    assert kernel_distance(x, y, range(12)).mean == pytest.approx(float(expected), rel=1e-12)


def test_the_kernel_distance_is_unbiased_and_covers_the_closed_form_of_two_gaussians():
    # Moments of N(0, 1/4): 0, 1/4, 0; of N(1/2, 1/4): 1/2, 1/2, 1/2. With k = (x y + 1)^3 the squared distance is 3, 3 and 1 times
    # the squared differences of the first, second and third moments.
    exact = 3 * 0.25 + 3 * (0.25) ** 2 + 0.5**2
    runs = [kernel_distance(_normal(40, 1, seed=i) * 0.5, _normal(40, 1, seed=1000 + i) * 0.5 + 0.5, range(40)) for i in range(200)]
    means = torch.tensor([run.mean for run in runs])
    assert abs(float(means.mean()) - exact) < 3 * float(means.std()) / 200**0.5
    assert 0.88 <= sum(run.low <= exact <= run.high for run in runs) / 200 <= 0.99


def test_images_of_few_prompts_are_not_closer_than_nothing_where_the_usual_estimate_says_so():
    ours, theirs = [], []
    for seed in range(100):
        prompts = _normal(6, 1, 3, seed=seed) * 2
        x = (prompts + 0.3 * _normal(6, 4, 3, seed=200 + seed)).flatten(0, 1)
        y = (prompts + 0.3 * _normal(6, 4, 3, seed=400 + seed)).flatten(0, 1)
        ours.append(kernel_distance(x, y, torch.arange(6).repeat_interleave(4).tolist()).mean)
        theirs.append(float(maximum_mean_discrepancy(poly_kernel(x, x), poly_kernel(x, y), poly_kernel(y, y))))
    assert abs(sum(ours)) / 100 < 3 * float(torch.tensor(ours).std()) / 10
    assert max(theirs) < 0


def test_identical_sets_have_distance_zero():
    x = _normal(9, 4)
    distance = kernel_distance(x, x, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert (distance.mean, distance.low, distance.high) == pytest.approx((0, 0, 0), abs=1e-13)


def test_renders_are_no_further_from_renders_than_chance_and_noise_and_blur_are():
    records = [record for record in shapes.prompts("train", seed=0, num=30) for _ in range(2)]
    prompt = [i // 2 for i in range(60)]
    network = RandomFeatures()
    reference, control = (features_of(shapes.render(records, seed), network=network) for seed in (1, 2))
    images = shapes.render(records, 3)
    noisy = (images + 0.2 * _normal(*images.shape).float()).clamp(0, 1)
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    same = kernel_distance(control, reference, prompt)
    assert same.low < 0 < same.high
    for spoilt in (noisy, blurred):
        distance = kernel_distance(features_of(spoilt, network=network), reference, prompt)
        assert distance.low > 0
        assert distance.mean > 10 * abs(same.mean)


def test_the_same_seed_builds_the_same_network_and_the_batch_size_changes_nothing():
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first = features_of(images, network=RandomFeatures(seed=3))
    second = features_of(images, network=RandomFeatures(seed=3), batch_size=2)
    assert first.shape == (5, 416)
    assert torch.allclose(first, second, atol=1e-6)
    assert not torch.allclose(first, features_of(images, network=RandomFeatures(seed=4)), atol=1e-2)


def test_the_features_use_no_global_randomness():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    RandomFeatures(seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_too_few_prompts_for_a_distance_are_refused():
    with pytest.raises(ValueError, match="at least 3"):
        kernel_distance(_normal(4, 3), _normal(4, 3), [0, 0, 1, 1])


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (3, 16, 16), (2, 3, 4, 4)])
def test_the_network_refuses_what_is_not_a_batch_of_images(shape):
    with pytest.raises(ValueError, match="needed"):
        RandomFeatures()(torch.zeros(shape))


def test_distance_within_a_prompt_is_the_mean_root_mean_square_over_pairs():
    images = torch.zeros(5, 3, 2, 2)
    images[1], images[4] = 1.0, 0.5
    # Prompt 3: rows 0, 1, 4 with values 0, 1, 0.5; prompt 8: rows 2 and 3, equal.
    assert within_prompt_distance(images, [3, 3, 8, 8, 3]).tolist() == pytest.approx([(1 + 0.5 + 0.5) / 3, 0.0])


def test_diversity_needs_two_images_of_every_prompt():
    with pytest.raises(ValueError, match="at least 2 images of each"):
        within_prompt_distance(torch.zeros(3, 4), [0, 0, 1])


def test_halved_diversity_is_a_half_with_no_doubt_where_all_prompts_halve():
    base = torch.tensor([1.0, 2.0, 3.0, 6.0])
    ratio = relative_diversity(base, base / 2)
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))


def test_relative_diversity_is_a_ratio_of_means_and_its_interval_is_that_of_the_prompts():
    ratio = relative_diversity(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0]))
    assert ratio.mean == 5 / 4
    assert (ratio.low, ratio.high) == (1.0, 2.0)


def test_a_base_without_diversity_is_refused():
    with pytest.raises(ValueError, match="nothing to be relative to"):
        relative_diversity(torch.zeros(4), torch.ones(4))


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (torch.eye(4), 4),
        (torch.ones(5, 3), 1),
        (torch.eye(2).repeat_interleave(2, 0), 2),
        (3 * torch.eye(4), 4),
    ],
)
def test_the_vendi_score_counts_different_rows(points, expected):
    assert vendi(points) == pytest.approx(expected, rel=1e-9)


def test_the_vendi_score_within_prompts_is_taken_prompt_by_prompt():
    assert within_prompt_vendi(torch.eye(3)[[0, 0, 1, 2]], [1, 1, 0, 0]).tolist() == pytest.approx([2.0, 1.0])


def test_a_row_of_length_zero_has_no_direction_and_is_refused():
    with pytest.raises(ValueError, match="length zero"):
        vendi(torch.zeros(2, 3))


def test_pixel_statistics_of_plain_pictures():
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    statistics = pixel_statistics(red)
    assert statistics.brightness == pytest.approx(0.2126)
    assert (statistics.saturation, statistics.edge_density) == (1, 0)
    halves = torch.zeros(2, 3, 8, 8)
    halves[..., 4:] = 1
    statistics = pixel_statistics(halves)
    assert statistics.brightness == pytest.approx(0.5)
    assert (statistics.saturation, statistics.edge_density) == (0, 1 / 8)


def test_drift_of_a_model_that_repeats_one_image_shows_in_diversity_but_not_for_an_unchanged_one():
    records = [record for record in shapes.prompts("train", seed=0, num=12) for _ in range(2)]
    prompt = [i // 2 for i in range(24)]
    base, reference, control = (shapes.render(records, seed) for seed in range(3))
    collapsed = measure_drift(base, base[::2].repeat_interleave(2, 0), reference, control, prompt)
    assert collapsed.pixel_diversity.mean == collapsed.feature_diversity.mean == 0
    assert collapsed.vendi.high < 1
    same = measure_drift(base, base, reference, control, prompt)
    assert same.pixel_diversity.mean == same.feature_diversity.mean == same.vendi.mean == 1
    assert same.distance_base == same.distance_tuned
    assert {len(row) for row in same.rows()} == {len(COLUMNS)}


def test_drift_refuses_sets_of_different_sizes():
    images = torch.zeros(6, 3, 8, 8)
    with pytest.raises(ValueError, match="as many"):
        measure_drift(images, images[:5], images, images, [0, 0, 1, 1, 2, 2])
