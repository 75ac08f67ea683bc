"""Conditioning: where the batch is in a denoiser's arguments, and that text is encoded once and alone."""

import pytest
import torch

from flowalign.pipelines import base
from flowalign.pipelines.conditioning import Conditioning, join, learn, num_bytes, split, stack
from tests.pipelines.tiny import PROMPTS


def ramp(*shape, start=0.0):
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape)


def recorded(num):
    """Arguments as pipelines pass them, under guidance: two halves of ``num`` samples each."""
    return {
        "embeds": ramp(2 * num, 3),
        "turned": ramp(4, 2 * num, 3),
        "ids": torch.ones(5, 3),
        "flag": False,
        "texts": [ramp(2, 3, start=100.0 * i) for i in range(2 * num)],
        "nested": {"pair": (ramp(num, 2), None), "deep": [ramp(1, num)]},
    }


def test_arguments_taken_apart_and_put_together_are_the_same():
    one, two = recorded(1), recorded(2)
    specs = {name: learn(name, one[name], two[name]) for name in one}
    for num in (1, 2, 3):
        value = recorded(num)
        for name, spec in specs.items():
            again = join(spec, iter(list(split(name, spec, value[name], num))))
            flat, expected = (torch.utils._pytree.tree_flatten(item) for item in (again, value[name]))
            assert flat[1] == expected[1]
            for got, wanted in zip(flat[0], expected[0], strict=True):
                assert torch.equal(got, wanted) if isinstance(wanted, torch.Tensor) else got == wanted


def test_taking_samples_selects_from_both_halves():
    one, two, three = recorded(1), recorded(2), recorded(3)
    specs = {name: learn(name, one[name], two[name]) for name in one}
    leaves = tuple(leaf for name, spec in specs.items() for leaf in split(name, spec, three[name], 3))
    cond = Conditioning(layout=(specs,), leaves=leaves, index=torch.arange(3)).take(torch.tensor([2, 0]))
    assert len(cond) == 2
    arguments = cond.arguments()[0]
    chosen = torch.tensor([2, 0, 5, 3])
    assert torch.equal(arguments["embeds"], three["embeds"][chosen])
    assert torch.equal(arguments["turned"], three["turned"][:, chosen])
    assert all(torch.equal(got, three["texts"][i]) for got, i in zip(arguments["texts"], chosen, strict=True))
    assert torch.equal(arguments["nested"]["pair"][0], three["nested"]["pair"][0][[2, 0]])
    assert torch.equal(cond.halves("embeds")[1], three["embeds"][[5, 3]])
    assert torch.equal(arguments["ids"], three["ids"])


@pytest.mark.parametrize(
    ("one", "two", "reason"),
    [
        (torch.zeros(1, 4), torch.zeros(2, 5), "padded to a fixed length"),
        (torch.zeros(1, 4), torch.ones(1, 4), "has no batch axis"),
        (torch.zeros(1, 4), torch.zeros(3, 4), "exactly one axis may double"),
        ([1], [1, 2, 3], "1 items for one sample and 3 for two"),
        ({"a": 1}, {"b": 1}, "has keys"),
        (3, 4, "is 3 for one sample and 4 for two"),
        (None, torch.zeros(2), "NoneType for one sample"),
    ],
)
def test_an_argument_whose_batch_cannot_be_found_is_refused_by_name(one, two, reason):
    with pytest.raises(ValueError, match=f"(?s)^mask: .*{reason}"):
        learn("mask", one, two)


def test_a_constant_that_depends_on_the_prompt_is_refused():
    spec = learn("length", 7, 7)
    with pytest.raises(ValueError, match="taken for a constant"):
        list(split("length", spec, 8, 1))


def test_prompts_of_different_lengths_are_kept_apart_and_told_by_their_kind():
    """As a pipeline that does not pad its texts gives them: ``[2 * num, length, 3]``, of lengths 2, 5 and 2."""
    spec = learn("embeds", ramp(2, 4, 3), ramp(4, 4, 3))
    texts = [ramp(2, length, 3, start=100.0 * i) for i, length in enumerate((2, 5, 2))]
    rows = [tuple(split("embeds", spec, text, 1)) for text in texts]
    cond = stack(({"embeds": spec},), rows, torch.tensor([0, 1, 2, 1]))
    assert cond.kinds().tolist() == [0, 1, 0, 1]
    short, long = cond.take(torch.tensor([2, 0])), cond.take(torch.tensor([1, 3]))
    assert short.kinds() is None
    assert long.kinds() is None
    assert torch.equal(short.arguments()[0]["embeds"], torch.stack([texts[2], texts[0]], 1).flatten(0, 1))
    assert torch.equal(long.arguments()[0]["embeds"], torch.stack([texts[1], texts[1]], 1).flatten(0, 1))
    assert torch.equal(long.halves("embeds")[1], texts[1][[1, 1]])
    assert torch.equal(cond.alone(0, 1, 2).take(torch.tensor([1])).arguments()[0]["embeds"], texts[1][1:])
    assert num_bytes(cond.leaves) == sum(text.nbytes for text in texts)


def test_prompts_of_one_length_are_of_one_kind(shared):
    assert shared.encode(PROMPTS).kinds() is None


def test_conditioning_does_not_depend_on_batch_mates(shared, build):
    together = shared.encode(PROMPTS).take(torch.tensor([1])).arguments()[0]
    alone = build(shared.family.guidance_scale).encode(PROMPTS[1:2]).arguments()[0]
    for name in ("encoder_hidden_states", "pooled_projections"):
        assert torch.equal(together[name], alone[name])


def test_under_guidance_conditioning_holds_the_empty_prompt_too(plain_and_guided):
    plain, guided = (flow.encode(["bb", ""]) for flow in plain_and_guided.values())
    negative, positive = guided.halves("encoder_hidden_states")
    assert torch.equal(positive, plain.halves("encoder_hidden_states")[0])
    assert torch.equal(negative, plain.halves("encoder_hidden_states")[0][[1, 1]])
    with pytest.raises(KeyError, match="takes no argument 'mask'"):
        plain.halves("mask")


def test_text_is_encoded_once_for_each_distinct_prompt(build, monkeypatch):
    flow, texts = build(4.5), []
    original = flow.pipe.encode_prompt
    flow.encode(["x"])

    def encode_prompt(*args, **options):
        if options.get("prompt_embeds") is None:
            texts.append(options["prompt"])
        return original(*args, **options)

    monkeypatch.setattr(flow.pipe, "encode_prompt", encode_prompt)
    first = flow.encode(["one", "two", "one"])
    flow.encode(["two"])
    assert texts == [["one"], ["two"]]
    assert first.leaves[0].shape[0] == 2


def test_the_prompts_used_longest_ago_are_forgotten_when_memory_is_full(build, monkeypatch):
    flow = build(4.5)
    flow.encode(["one"])
    size = num_bytes(flow._encoded["one"])
    monkeypatch.setattr(base, "CACHE_BYTES", 3 * size)
    flow.encode(["two", "three"])
    flow.encode(["one", "four"])
    assert list(flow._encoded) == ["three", "one", "four"]
    # What one call needs is never too much.
    assert len(flow.encode(["a", "b", "c", "d"])) == 4
    assert list(flow._encoded) == ["a", "b", "c", "d"]


def test_a_rollout_encodes_no_text_and_runs_no_reference(build, monkeypatch):
    from flowalign.core.plans import ode
    from tests.pipelines.conftest import STEPS
    from tests.pipelines.tiny import initial, noise

    flow = build(4.5)
    cond = flow.encode(PROMPTS)
    flow.sigmas()
    for encoder in (flow.pipe.text_encoder, flow.pipe.text_encoder_2, flow.pipe.text_encoder_3):
        monkeypatch.setattr(encoder, "forward", lambda *args, **options: pytest.fail("text was encoded"))
    calls = []
    handle = flow.denoiser.register_forward_pre_hook(lambda module, args: calls.append(1))
    flow.rollout(cond, ode(STEPS), x_init=initial(), noise=noise)
    handle.remove()
    assert len(calls) == STEPS


def test_conditioning_moves_as_a_whole(shared):
    moved = shared.encode(PROMPTS).to("meta")
    assert all(tensor.device.type == "meta" for tensor in (*moved.leaves, moved.index))
    assert len(moved) == 3


def test_no_prompts_are_refused(shared):
    with pytest.raises(ValueError, match="at least one prompt"):
        shared.encode([])
