"""HPS v2, the aesthetic predictor and ImageReward against the published formula, each on a tiny model of its architecture."""

import dataclasses
import json
import math
import warnings

import open_clip
import pytest
import torch
from torch.nn import functional
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as classic
from transformers import BertTokenizer, CLIPModel

from flowalign.rewards import aesthetic, heads, hpsv2, image_reward, pixels
from tests.rewards import tiny

PROMPTS = ["a red ring", "two dogs and a cat", "a red ring"]


def layers(width, seed=0, prefix="layers."):
    draw = torch.Generator().manual_seed(seed)
    sizes = [width, 1024, 128, 64, 16, 1]
    state = {}
    for number, inside, outside in zip(heads.LAYERS, sizes[:-1], sizes[1:], strict=True):
        state[f"{prefix}{number}.weight"] = torch.randn(outside, inside, generator=draw) / inside**0.5
        state[f"{prefix}{number}.bias"] = torch.randn(outside, generator=draw)
    return state


def through(state, x, prefix="layers."):
    for number in heads.LAYERS:
        x = functional.linear(x, state[f"{prefix}{number}.weight"].to(x), state[f"{prefix}{number}.bias"].to(x))
    return x[:, 0]


def test_the_folded_head_is_the_head():
    state = layers(16)
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    folded = heads.fold(state, "layers.", "head")
    torch.testing.assert_close(x @ folded.weight + folded.bias, through(state, x), atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match=r"lack 'layers.7.bias'"):
        heads.fold({name: value for name, value in state.items() if name != "layers.7.bias"}, "layers.", "head")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny.clip(folder)
    return folder


def test_aesthetic_is_the_head_on_the_unit_embedding(clip_folder):
    torch.save(layers(16), clip_folder / "head.pth")
    reward = aesthetic.Config(head=str(clip_folder / "head.pth"), model=str(clip_folder), device="cpu").build()
    images = tiny.pictures()
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        embedded = model.visual_projection(model.vision_model(pixel_values=pixels.prepare(images, size=32)).pooler_output)
    torch.testing.assert_close(
        reward(images, PROMPTS, [{}] * 3), through(layers(16), functional.normalize(embedded, dim=-1)), atol=1e-4, rtol=1e-4
    )
    torch.save(layers(24), clip_folder / "other.pth")
    with pytest.raises(ValueError, match="takes 24 values, but .* embeds in 16"):
        aesthetic.Config(head=str(clip_folder / "other.pth"), model=str(clip_folder), device="cpu").build()
    with pytest.raises(FileNotFoundError, match="no such file"):
        aesthetic.Config(model=str(clip_folder)).build()


def test_a_file_that_would_run_code_is_refused(clip_folder):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"layers.0.weight": Evil()}, clip_folder / "evil.pth")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        aesthetic.Config(head=str(clip_folder / "evil.pth"), model=str(clip_folder)).build()


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hps")
    tower = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    (folder / "tiny-hps.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": tower, "text_cfg": text}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-hps").eval()
    with torch.no_grad():  # as initialised it hardly looks at the image
        model.visual.proj.mul_(20)
        model.visual.conv1.weight.mul_(20)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "w.pt")
    return model, hpsv2.Config(weights=str(folder / "w.pt"), architecture="tiny-hps", device="cpu").build()


def published_hps(model, picture, prompt):
    """Scale the long side with Pillow, pad with black, normalise: what the authors' transform does."""
    scale = 32 / max(picture.size)
    sizes = [round(side * scale) for side in reversed(picture.size)]
    picture = classic.resize(picture, sizes, InterpolationMode.BICUBIC)
    pad = [32 - sizes[1], 32 - sizes[0]]
    picture = classic.pad(picture, [pad[0] // 2, pad[1] // 2, pad[0] - pad[0] // 2, pad[1] - pad[1] // 2], fill=0)
    pixel = classic.normalize(classic.to_tensor(picture), pixels.CLIP_MEAN, pixels.CLIP_STD)[None]
    with torch.no_grad():
        image, text = model.encode_image(pixel), model.encode_text(open_clip.get_tokenizer("tiny-hps")([prompt]))
    return float(functional.cosine_similarity(image, text))


@pytest.mark.parametrize("size", [(48, 40), (40, 64), (24, 24)])
def test_hps_is_the_cosine_on_padded_images(hps, size):
    model, reward = hps
    images = tiny.pictures(3, *size)
    wanted = [published_hps(model, picture, prompt) for picture, prompt in zip(pixels.pictures(images), PROMPTS, strict=True)]
    assert reward(images, PROMPTS, [{}] * 3).tolist() == pytest.approx(wanted, abs=1e-3)
    assert max(wanted) - min(wanted) > 0.01


def test_hps_and_image_reward_say_once_how_long_a_prompt_is_that_they_cut(hps, blip):
    images = tiny.pictures(2)
    for reward, fits, short, long, tokens, most in (
        (hps[1], "dog " * 75, "dog " * 75, "dog " * 80, 82, 77),
        (blip[2], "dogs " * 33, "dogs " * 33, "dogs " * 50, 52, 35),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            whole = reward(images[:1], [fits], [{}])
        with pytest.warns(UserWarning, match=f"has {tokens} tokens; the model reads the first {most}, as published"):
            found = reward(images, [short, long], [{}] * 2)
        assert found[0].item() == pytest.approx(whole.item(), abs=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = reward(images[1:], [long + "dogs " * 100], [{}])
        assert again.item() == pytest.approx(found[1].item(), abs=1e-5)  # what comes after counts for nothing


def test_hps_refuses_weights_of_another_architecture(hps, tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="does not hold the weights of tiny-hps"):
        hpsv2.Config(weights=str(tmp_path / "w.pt"), architecture="tiny-hps").build()
    with pytest.raises(FileNotFoundError, match=r"run: hf download xswu/HPSv2 HPS_v2.1_compressed.pt"):
        hpsv2.Config().build()


# -- ImageReward: the published names and sizes, and its forward written out ----------------------------------------------------------


WIDTH, SEEN, DEPTH = 64, 64, 2


def blip_state(num_words):
    draw = torch.Generator().manual_seed(0)

    def value(*shape):
        return torch.randn(*shape, generator=draw) / (shape[-1] ** 0.5 if len(shape) > 1 else 4)

    state = {"cls_token": value(1, 1, SEEN), "pos_embed": value(1, 5, SEEN), "patch_embed.proj.weight": value(SEEN, 3, 16, 16)}
    state |= {"patch_embed.proj.bias": value(SEEN), "norm.weight": 1 + value(SEEN), "norm.bias": value(SEEN)}
    for i in range(DEPTH):
        for name, outside, inside in (
            ("attn.qkv", 3 * SEEN, SEEN),
            ("attn.proj", SEEN, SEEN),
            ("mlp.fc1", 96, SEEN),
            ("mlp.fc2", SEEN, 96),
        ):
            state |= {f"blocks.{i}.{name}.weight": value(outside, inside), f"blocks.{i}.{name}.bias": value(outside)}
        for name in ("norm1", "norm2"):
            state |= {f"blocks.{i}.{name}.weight": 1 + value(SEEN), f"blocks.{i}.{name}.bias": value(SEEN)}
    full = {f"blip.visual_encoder.{name}": tensor for name, tensor in state.items()}
    text = {"embeddings.word_embeddings.weight": value(num_words, WIDTH), "embeddings.position_embeddings.weight": value(64, WIDTH)}
    norms = ["embeddings.LayerNorm"]
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}"
        for kind, inside in (("attention", WIDTH), ("crossattention", SEEN)):
            for part, width in (("self.query", WIDTH), ("self.key", inside), ("self.value", inside), ("output.dense", WIDTH)):
                text |= {f"{layer}.{kind}.{part}.weight": value(WIDTH, width), f"{layer}.{kind}.{part}.bias": value(WIDTH)}
            norms.append(f"{layer}.{kind}.output.LayerNorm")
        text |= {f"{layer}.intermediate.dense.weight": value(80, WIDTH), f"{layer}.intermediate.dense.bias": value(80)}
        text |= {f"{layer}.output.dense.weight": value(WIDTH, 80), f"{layer}.output.dense.bias": value(WIDTH)}
        norms.append(f"{layer}.output.LayerNorm")
    for name in norms:
        text |= {f"{name}.weight": 1 + value(WIDTH), f"{name}.bias": value(WIDTH)}
    full |= {f"blip.text_encoder.{name}": tensor for name, tensor in text.items()}
    full["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    return full | layers(WIDTH, prefix="mlp.layers.")


def written_out(state, pixel, ids, mask):
    """ImageReward's forward, from the published names alone; heads of 64, so one head here."""

    def linear(name, x):
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(query, key, value, bias=0.0):
        return ((query @ key.transpose(1, 2) / 64**0.5 + bias).softmax(-1)) @ value

    see = "blip.visual_encoder"
    patches = functional.conv2d(pixel, state[f"{see}.patch_embed.proj.weight"], state[f"{see}.patch_embed.proj.bias"], stride=16)
    x = torch.cat([state[f"{see}.cls_token"].expand(len(pixel), -1, -1), patches.flatten(2).transpose(1, 2)], 1) + state[f"{see}.pos_embed"]
    for i in range(DEPTH):
        block = f"{see}.blocks.{i}"
        x = x + linear(f"{block}.attn.proj", attend(*linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)))
        x = x + linear(f"{block}.mlp.fc2", functional.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{see}.norm", x, 1e-6)
    read = "blip.text_encoder"
    x = state[f"{read}.embeddings.word_embeddings.weight"][ids] + state[f"{read}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(f"{read}.embeddings.LayerNorm", x, 1e-12)
    bias = (1 - mask[:, None].float()) * -1e9
    for i in range(DEPTH):
        layer = f"{read}.encoder.layer.{i}"
        for kind, source, hidden in (("attention", None, bias), ("crossattention", seen, 0.0)):
            other = x if source is None else source
            parts = [linear(f"{layer}.{kind}.self.{part}", y) for part, y in (("query", x), ("key", other), ("value", other))]
            x = norm(f"{layer}.{kind}.output.LayerNorm", linear(f"{layer}.{kind}.output.dense", attend(*parts, hidden)) + x, 1e-12)
        inner = linear(f"{layer}.output.dense", functional.gelu(linear(f"{layer}.intermediate.dense", x)))
        x = norm(f"{layer}.output.LayerNorm", inner + x, 1e-12)
    return (through(state, x[:, 0], "mlp.layers.") - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ring", "two", "dogs", "and", "cat"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    state = blip_state(len(words))
    torch.save(state, folder / "w.pt")
    return tokenizer, state, image_reward.Config(weights=str(folder / "w.pt"), tokenizer=str(folder), device="cpu", batch_size=2).build()


def test_image_reward_is_the_published_forward(blip):
    tokenizer, state, reward = blip
    images = tiny.pictures()
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    wanted = written_out(state, pixels.prepare(images, size=32), tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(reward(images, PROMPTS, [{}] * 3), wanted, atol=1e-4, rtol=1e-4)
    assert float(wanted.std()) > 0.01


def test_image_reward_has_a_gradient(blip):
    images = tiny.pictures(1).requires_grad_()
    blip[2](images, PROMPTS[:1], [{}]).sum().backward()
    assert math.isfinite(float(images.grad.norm()))
    assert float(images.grad.norm()) > 0


@pytest.mark.parametrize(("raw", "score"), [(0.16717362830052426, 0), (1.2005131248571277, 1), (-0.8661658763045472, -1)])
def test_image_reward_is_standardised(blip, raw, score):
    always = heads.Affine(weight=torch.zeros(WIDTH), bias=torch.tensor(raw))
    found = dataclasses.replace(blip[2], head=always)(tiny.pictures(), PROMPTS, [{}] * 3)
    assert found.tolist() == pytest.approx([score] * 3, abs=1e-6)


def test_image_reward_refuses_other_files(tmp_path):
    torch.save(layers(64), tmp_path / "w.pt")
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    BertTokenizer(vocab=words).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no ImageReward model"):
        image_reward.Config(weights=str(tmp_path / "w.pt"), tokenizer=str(tmp_path)).build()
