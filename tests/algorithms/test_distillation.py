"""The distillations on Gaussian worlds, where fake score, teacher and density ratio are exact."""

import math

import pytest
import torch
from torch import nn

from flowalign.algorithms import dmd2, f_distill
from flowalign.core.algorithm import Update
from flowalign.core.discriminators import Discriminator
from flowalign.core.distillation import FakeScore, Levels, Pairs
from flowalign.core.divergences import weight
from flowalign.core.ratios import RatioWeights, identity
from flowalign.core.worlds import GaussianWorld

TEACHER = (0.0, 1.0)
SIGMAS = torch.tensor([1.0, 0.0])


class Student(nn.Module):
    """x0 = mean + spread * noise, as the velocity that a step from pure noise turns into it; on a grid of two steps likewise at its second rung."""

    def __init__(self, mean, spread):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.spread = nn.Parameter(torch.tensor(spread, dtype=torch.float64))

    def velocity(self, x, sigma):
        return (x - (self.mean + self.spread * x)) / sigma[:, None]

    def world(self):
        return GaussianWorld(self.mean.item(), self.spread.item())


def log_density_ratio(student, x, sigma):
    """Log of the noised teacher's density over the noised student's, ``[rows, 1]``."""
    mean, spread = student.mean.item(), student.spread.item()

    def log_density(mean, std):
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        square = (x - ((1 - sigma) * mean)[:, None]).square().sum(1)
        return -square / (2 * variance) - x.shape[1] * variance.log() / 2

    return (log_density(*TEACHER) - log_density(mean, spread))[:, None]


class Networks:
    """Exact critics of a student, and a count of what was asked."""

    def __init__(self, student):
        self.student, self.asked = student, []

    def __call__(self, x, sigma, sample, role):
        self.asked.append((role, len(x)))
        if role == "current":
            return self.student.velocity(x, sigma)
        if role == "discriminator":
            return log_density_ratio(self.student, x, sigma)
        world = self.student.world() if role == "fake" else GaussianWorld(*TEACHER)
        velocity = world.velocity(x, sigma)
        if role != "teacher":
            return velocity
        # Guidance away from a wider unconditional law.
        return velocity + 1.5 * (velocity - GaussianWorld(0.5, 2.0).velocity(x, sigma))


def pairs(num, shares=1, sigmas=SIGMAS, dims=1):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(num, dims, generator=generator, dtype=torch.float64)
    every = torch.arange(num)
    return Pairs(
        noise=noise,
        x0=noise + 0.25,
        sigmas=sigmas.double(),
        spread=1.0,
        finish=1.0,
        prompt=every,
        group=every,
        sample=torch.zeros(num, dtype=torch.int64),
        share=every % shares,
        keep=torch.ones(num, dtype=torch.bool),
    )


def gradient(algorithm, student, batch, *, step=0, parts=1, state=None):
    """The gradient of the student's update, a mean over rows, as the loop forms it."""
    networks, update = Networks(student), Update(seed=0, step=step, index=algorithm.num_updates - 1)
    rows = algorithm.rows(batch, update)
    split = rows.split(math.ceil(len(rows) / parts))
    with torch.set_grad_enabled(parts == 1):
        looked = [algorithm.look(part, networks) for part in split]
    weighed, state, logged = algorithm.weigh(looked, algorithm.start() if state is None else state, identity)
    student.zero_grad()
    for part in weighed:
        algorithm.loss("current", part, networks).value.sum().backward()
    found = [parameter.grad / len(rows) for parameter in (student.mean, student.spread)]
    return torch.stack(found), weighed, state, networks, logged


def built(name="jensen_shannon", **options):
    return f_distill.Config(weights=f_distill.RatioWeights(divergence=name, num_bins=0), critic_updates=1, **options).build()


def test_the_gradient_is_that_of_a_plain_loop_over_samples():
    student, algorithm = Student(0.7, 1.4), built(adversarial_weight=0.3)
    found, (rows,), _, _, _ = gradient(algorithm, student, pairs(40, shares=2))
    mean, spread = student.mean.item(), student.spread.item()
    drawn = [(float(z), float(e), float(s)) for z, e, s in zip(rows["first"], rows["noise"], rows["sigma"], strict=True)]
    terms = []
    for z, e, s in drawn:
        x0 = mean + spread * z
        x = (1 - s) * x0 + s * e
        own, other = ((1 - s) ** 2 * var + s**2 for var in (spread**2, 1.0))
        fake = mean + (1 - s) * spread**2 / own * (x - (1 - s) * mean)
        teacher = (1 - s) / other * x
        log_ratio = -(x**2) / (2 * other) - math.log(other) / 2 + (x - (1 - s) * mean) ** 2 / (2 * own) + math.log(own) / 2
        slope = -x / other + (x - (1 - s) * mean) / own  # of the log-ratio in x
        ratio = min(max(math.exp(log_ratio), 0.1), 20.0)
        h = ratio / (1 + ratio)
        push = (fake - teacher) / (abs(x0 - teacher) + 1e-6)
        adversarial = -0.3 / (1 + math.exp(log_ratio)) * slope * (1 - s)
        terms.append((z, h, push, adversarial))
    normaliser = sum(h for _, h, _, _ in terms) / len(terms)
    expected = [
        sum((h / normaliser * push + adversarial) * factor(z) for z, h, push, adversarial in terms) / len(terms)
        for factor in (lambda z: 1.0, lambda z: z)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_reverse_kl_is_dmd2(guidance):
    student, batch = Student(0.7, 1.4), pairs(40, shares=2)
    options = {"adversarial_weight": 0.1, "guidance_scale": guidance}
    one = gradient(built("reverse_kl", **options), student, batch)[0]
    two = gradient(dmd2.Config(critic_updates=1, **options).build(), student, batch)[0]
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
    assert not torch.allclose(one, gradient(built("forward_kl", **options), student, batch)[0], rtol=1e-2)


def test_guidance_is_pushed_beside_matching_and_not_weighted():
    student, batch = Student(0.7, 1.4), pairs(40, shares=2)
    guided, (rows,), _, _, _ = gradient(built(guidance_scale=2.5), student, batch)
    x0 = student.mean + student.spread * rows["first"]
    sigma = rows["sigma"]
    x = ((1 - sigma)[:, None] * x0 + sigma[:, None] * rows["noise"]).detach()
    plain, wide = (GaussianWorld(*law).velocity(x, sigma) for law in (TEACHER, (0.5, 2.0)))
    conditional, unconditional = x - sigma[:, None] * plain, x - sigma[:, None] * wide
    torch.testing.assert_close(rows["guidance"], -1.5 * (conditional - unconditional), rtol=1e-9, atol=1e-12)
    guided_x0 = conditional + 1.5 * (conditional - unconditional)
    torch.testing.assert_close(rows["scale"], 1 / ((x0 - guided_x0).abs().mean(1).detach() + 1e-6), rtol=1e-9, atol=0)
    pushed = (rows["matching"][:, 0] * rows["weight"] + rows["guidance"][:, 0]) * rows["scale"]
    logits = log_density_ratio(student, x.requires_grad_(), sigma)
    slope = torch.autograd.grad(torch.nn.functional.softplus(-logits).sum(), x)[0][:, 0] * (1 - sigma)
    expected = (pushed + 1e-3 * slope).mean()
    torch.testing.assert_close(guided[0], expected.detach(), rtol=1e-9, atol=1e-12)


def test_guidance_is_weighed_where_told():
    student, batch = Student(0.7, 1.4), pairs(40, shares=2)
    (rows,) = gradient(built(guidance_scale=2.5), student, batch)[1]
    apart, whole = (gradient(built(guidance_scale=2.5, weigh_guidance=told), student, batch)[0] for told in (False, True))
    x0_slope = torch.stack([torch.ones_like(rows["scale"]), rows["first"][:, 0]])  # of the student's mean and spread
    more = rows["guidance"][:, 0] * (rows["weight"] - 1) * rows["scale"]
    torch.testing.assert_close(whole - apart, (x0_slope * more).mean(1), rtol=1e-9, atol=1e-12)
    assert (whole - apart).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "forward_kl"])
def test_micro_batches_change_nothing_because_weights_are_of_the_whole_batch(name):
    student, batch = Student(0.7, 1.4), pairs(40, shares=2)
    whole, _, state, one, _ = gradient(built(name, adversarial_weight=0.1), student, batch)
    apart, _, other, several, _ = gradient(built(name, adversarial_weight=0.1), student, batch, parts=4)
    torch.testing.assert_close(whole, apart, rtol=1e-12, atol=1e-15)
    assert torch.equal(state["calibration"], other["calibration"])

    def rows(networks, role):
        return sum(number for asked, number in networks.asked if asked == role)

    # One batch: the student's pass is made once. Several: once more, so that weights can be normalised over all of them.
    assert [rows(one, role) for role in ("current", "reference", "fake")] == [20, 20, 20]
    assert [rows(several, role) for role in ("current", "reference", "fake")] == [40, 20, 20]


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl"])
def test_a_student_ends_at_its_teacher(name):
    student, algorithm = Student(1.0, 0.5), built(name)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    # Of several elements: DMD's scale, which divides by a mean over them, is wild for one.
    batch, state = pairs(128, shares=2, dims=8), None
    for step in range(300):
        _, _, state, _, _ = gradient(algorithm, student, batch, step=step, state=state)
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 300)
        optimizer.step()
    assert student.mean.item() == pytest.approx(TEACHER[0], abs=0.05)
    assert student.spread.item() == pytest.approx(TEACHER[1], abs=0.05)


def test_the_weights_are_those_of_the_exact_ratio():
    student = Student(0.7, 1.4)
    _, (rows,), _, _, logged = gradient(built("forward_kl"), student, pairs(40, shares=2))
    x = (1 - rows["sigma"])[:, None] * rows["x0"].detach() + rows["sigma"][:, None] * rows["noise"]
    h = weight("forward_kl", log_density_ratio(student, x, rows["sigma"])[:, 0].clamp(math.log(0.1), math.log(20)))
    torch.testing.assert_close(rows["weight"], h / h.mean(), rtol=1e-9, atol=0)
    assert logged["ratio/effective_share"] == pytest.approx(float(h.sum() ** 2 / h.square().sum()) / len(h))


def test_a_student_of_several_steps_is_trained_at_the_states_that_its_own_sampler_passes():
    grid = torch.tensor([1.0, 0.6, 0.25, 0.0], dtype=torch.float64)
    student, algorithm = Student(0.3, 0.8), built(student_steps=3)
    batch = pairs(12, shares=2, sigmas=grid)
    seen = set()
    for step in range(8):
        rows = algorithm.rows(batch, Update(seed=0, step=step, index=1))
        networks = Networks(student)
        made = algorithm.generate(rows, networks)
        x, rung = rows["first"], int(rows["rung"][0])
        assert len(set(rows["rung"].tolist())) == 1
        for now, then in zip(grid[:rung].tolist(), grid[1 : rung + 1].tolist(), strict=True):
            x = x + (then - now) * student.velocity(x, torch.full((len(x),), now, dtype=torch.float64))
        expected = x - grid[rung] * student.velocity(x, torch.full((len(x),), grid[rung].item(), dtype=torch.float64))
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)
        assert len(networks.asked) == rung + 1
        seen.add(rung)
    assert seen == {0, 1, 2}


def test_turns_are_the_students_in_a_warm_up_then_the_critics_and_the_students_when_it_may():
    algorithm = f_distill.Config(critic_updates=2, warmup_steps=1).build()

    def turns(step, index, ready):
        return algorithm.turns(Update(seed=0, step=step, index=index), ready=ready)

    assert [turns(0, index, False) for index in range(3)] == [("current",)] * 3
    assert [turns(1, index, False) for index in range(3)] == [("fake", "discriminator")] * 2 + [()]
    assert [turns(1, index, True) for index in range(3)] == [("fake", "discriminator")] * 2 + [("current",)]
    assert dmd2.Config(adversarial_weight=0.0).build().turns(Update(seed=0, step=0, index=0), ready=True) == ("fake",)


def test_the_warm_up_draws_the_student_to_the_teachers_samples_of_the_same_noise():
    student = Student(0.2, 0.9)
    algorithm, batch = f_distill.Config(critic_updates=1, warmup_steps=1).build(), pairs(10, shares=2)
    rows = algorithm.rows(batch, Update(seed=0, step=0, index=1))
    found = algorithm.loss("current", rows, Networks(student))
    noise = batch.noise[batch.share == 1]
    error = (0.2 + 0.9 * noise - (noise + 0.25)).square()[:, 0]
    torch.testing.assert_close(found.value, (error + 0.03**2).sqrt() - 0.03, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.metrics["pair_error"], error, rtol=1e-9, atol=1e-12)


def test_the_critics_losses():
    student = Student(0.7, 1.4)
    settings = Discriminator(r1=0.5, r1_noise=0.2)
    algorithm, batch = built(discriminator=settings), pairs(10, shares=2)
    networks = Networks(student)
    rows = algorithm.look(algorithm.rows(batch, Update(seed=0, step=0, index=0)), networks)
    sigma, noise = rows["sigma"], rows["noise"]
    x0 = (0.7 + 1.4 * rows["first"]).detach()
    torch.testing.assert_close(rows["x0"], x0)
    assert not rows["x0"].requires_grad

    def noised(clean):
        return (1 - sigma)[:, None] * clean + sigma[:, None] * noise

    fake = algorithm.loss("fake", rows, networks)
    exact = student.world().velocity(noised(x0), sigma)
    torch.testing.assert_close(fake.value, (exact - (noise - x0)).square()[:, 0])
    judged = algorithm.loss("discriminator", rows, networks)
    clean = noised(batch.x0[batch.share == 0])
    real, made, disturbed = (log_density_ratio(student, x, sigma)[:, 0] for x in (clean, noised(x0), clean + 0.2 * rows["disturbance"]))
    expected = torch.log1p(torch.exp(-real)) + torch.log1p(torch.exp(made)) + 0.5 * (real - disturbed).square()
    torch.testing.assert_close(judged.value.double(), expected, rtol=1e-6, atol=1e-7)
    right = ((real > 0).double() + (made < 0).double()) / 2
    torch.testing.assert_close(judged.metrics["discriminator/accuracy"].double(), right)
    # By quarters of the levels that are drawn, 0.02 to 0.98.
    for number in range(4):
        told = judged.metrics[f"discriminator/accuracy_{number}"]
        inside = (sigma > 0.02 + 0.24 * number) & (sigma <= 0.26 + 0.24 * number)
        assert torch.equal(~torch.isnan(told), inside)
        assert torch.equal(told[inside].double(), right[inside])


def test_levels_lie_within_their_limits_and_a_shift_makes_them_noisier():
    share = torch.linspace(0, 1, 101, dtype=torch.float64)
    plain, shifted = (Levels(shift=shift).of(share) for shift in (1.0, 3.0))
    for levels in (plain, shifted):
        assert levels[0].item() == pytest.approx(0.02)
        assert levels[-1].item() == pytest.approx(0.98)
    assert shifted.median() > plain.median() + 0.2


def test_a_student_waits_for_critics_that_are_calibrated_and_not_for_ever():
    algorithm = f_distill.Config(warmup_steps=5, least_steps=3, patience=20).build()
    ones = torch.ones(10).double()
    good, bad = ({"calibration": torch.stack([mean * ones, ones])} for mean in (1.5, 0.3))
    assert [algorithm.is_ready(good, held) for held in (5, 7, 8)] == [False, False, True]
    assert not algorithm.is_ready(bad, 24)
    with pytest.raises(ValueError, match=r"in 20 steps of the critics alone .*mean ratios by noise level 0.30.* algorithm dmd2"):
        algorithm.is_ready(bad, 25)


def test_weights_that_do_not_read_the_ratio_do_not_wait_for_it():
    options = {"warmup_steps": 5, "least_steps": 3, "patience": 20}
    settings = (RatioWeights(divergence="reverse_kl"), RatioWeights(divergence="forward_kl", strength=0.0))
    others = [f_distill.Config(weights=weights, **options).build() for weights in settings]
    plain = dmd2.Config(**options).build()
    for held in range(30):
        for algorithm in others:
            assert algorithm.is_ready(algorithm.start(), held) == plain.is_ready({}, held) == (held >= 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_steps": 0}, "student_steps: got 0, needed at least 1"),
        ({"guidance_scale": 0.5}, "guidance_scale: got 0.5, needed at least 1"),
        ({"adversarial_weight": 0.0}, "reads density ratios off the discriminator"),
        ({"teacher_steps": 0}, "teacher_steps: got 0"),
        ({"patience": 10, "least_steps": 10}, "patience: got 10, needed more than least_steps"),
        ({"warmup_learning_rate": 0.0}, "warmup_learning_rate: got 0.0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        f_distill.Config(**options)


def test_levels_and_rates_that_cannot_be_meant_are_refused():
    with pytest.raises(ValueError, match="got lowest 0.0, highest 0.98 and shift 1.0; needed 0 < lowest < highest <= 1"):
        Levels(lowest=0.0)
    with pytest.raises(ValueError, match="got learning_rate -1.0 and weight_decay"):
        FakeScore(learning_rate=-1.0)


def test_the_fake_score_has_noise_levels_of_its_own_where_told():
    student, batch = Student(0.7, 1.4), pairs(40, shares=2)
    plain, own = (built(fake=FakeScore(levels=levels)) for levels in (None, Levels(lowest=0.9, highest=1.0)))
    critics = Update(seed=0, step=0, index=0)
    one, two = (algorithm.rows(batch, critics) for algorithm in (plain, own))
    assert torch.equal(one["sigma"], two["sigma"])  # the discriminator judges where samples are weighed
    assert "fake_sigma" not in one.columns
    assert ((two["fake_sigma"] >= 0.9) & (two["fake_sigma"] <= 1)).all()
    assert two["fake_sigma"].unique().numel() == 20

    def asked(role, rows):
        seen = []

        def velocity(x, sigma, sample, name):
            seen.append(sigma)
            return Networks(student)(x, sigma, sample, name)

        own.loss(role, own.look(rows, Networks(student)), velocity)
        return seen[0][:20]

    assert torch.equal(asked("fake", two), two["fake_sigma"])
    assert torch.equal(asked("fake", one), one["sigma"])
    assert torch.equal(asked("discriminator", two), two["sigma"])
    assert "fake_sigma" not in own.rows(batch, Update(seed=0, step=0, index=1)).columns


def test_unknown_divergences_and_taps_are_refused():
    with pytest.raises(ValueError, match="jensen_shannon"):
        f_distill.RatioWeights(divergence="jensen_shanon")
    with pytest.raises(ValueError, match=r"shares of the depth in \[0, 1\)"):
        Discriminator(taps=(1.0,))
