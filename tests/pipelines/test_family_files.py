"""Files of every family load in a bare diffusers pipeline and make the same pictures."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowalign.core.plans import ode
from flowalign.pipelines import loaded_back, lora_files, merging, parity
from flowalign.pipelines.fingerprint import fingerprint
from flowalign.pipelines.loading import shapes_folder
from flowalign.pipelines.roles import LoRA
from flowalign.pipelines.watch import own_images
from tests.pipelines.families import build, pipeline

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ["flux dev", "sd 1.5 guided", "sdxl guided", "z_image guided", "qwen_image guided", "auto lumina2"]


def trained(case, **options):
    """A pipeline whose adapters do something."""
    flow = build(case, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow.roles.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return flow


@pytest.mark.parametrize("case", FAMILIES)
def test_a_saved_adapter_gives_the_same_images_in_a_bare_pipeline(case, tmp_path):
    flow = trained(case)
    flow.save(tmp_path / "weights", notes={"base_model": "owner/base", "seed": "7"})
    it, stranger = parity.subject(flow), pipeline(case)
    base = own_images(flow, stranger, parity.PROMPT, it.noise, 5)
    stranger.load_lora_weights(tmp_path / "weights")
    made = flow.decode(it.run(ode(5)).x0)
    written = own_images(flow, stranger, parity.PROMPT, it.noise, 5)
    assert (written - made).abs().max() < 1e-5
    assert (written - base).abs().max() > 1e-2
    notes = lora_files.notes_of(tmp_path / "weights")
    assert len(notes.pop("base_fingerprint")) == 32
    assert notes.pop("base_dtype") == "float32"
    assert notes == {"base_model": "owner/base", "seed": "7"}
    assert lora_files.settings(tmp_path / "weights")[:2] == (4, 8.0)
    again = build(case)
    again.load_lora(tmp_path / "weights")
    assert torch.equal(again.decode(parity.subject(again).run(ode(5)).x0), made)


def test_a_merged_pipeline_needs_no_adapter(tmp_path):
    flow = trained("sd 1.5 guided")
    merging.merge(flow, tmp_path / "merged")
    it = parity.subject(flow)
    merged = type(flow.pipe).from_pretrained(tmp_path / "merged", safety_checker=None)
    merged.set_progress_bar_config(disable=True)
    assert not any("lora" in name for name, _ in merged.unet.named_modules())
    assert (own_images(flow, merged, parity.PROMPT, it.noise, 5) - flow.decode(it.run(ode(5)).x0)).abs().max() < 1e-4
    # The pipeline that was merged from is what it was.
    assert flow.roles.num_layers == 32
    with pytest.raises(ValueError, match="no adapters; its weights are whole"):
        merging.merge(build("sd 1.5", lora=None), tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_makes_no_second_network_and_leaves_the_live_one_as_it_was(tmp_path, monkeypatch, dtype):
    flow = trained("sd 1.5 guided", pipe=pipeline("sd 1.5 guided").to(dtype))
    before = {name: value.clone() for name, value in flow.denoiser.state_dict().items()}
    live = {value.data_ptr() for value in flow.denoiser.state_dict().values()}
    monkeypatch.setattr(
        merging, "compare_behaviour", lambda flow, role, loaded, **options: seen.append(loaded) or honest(flow, role, loaded, **options)
    )
    monkeypatch.setattr(merging, "write_pipeline", lambda flow, network, *rest: written.append(network) or write(flow, network, *rest))
    seen, written, honest, write = [], [], loaded_back.compare_behaviour, lora_files.write_pipeline
    copied = lora_files.copy.deepcopy
    monkeypatch.setattr(
        lora_files.copy, "deepcopy", lambda it, *rest: pytest.fail("a copy") if isinstance(it, torch.nn.Module) else copied(it, *rest)
    )
    merging.merge(flow, tmp_path / "merged", notes={"seed": "7"})
    assert seen[0].network is flow.denoiser
    # What is written beside the merged layers are the live tensors themselves.
    own = [name for name, value in written[0].state_dict().items() if value.data_ptr() not in live]
    assert set(own) == {f"{name}.weight" for name in flow.roles.layers}
    assert {written[0].get_parameter(name).device.type for name in own} == {"cpu"}
    after = flow.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert lora_files.notes_of(tmp_path / "merged") == {"seed": "7"}


@pytest.mark.parametrize("spoil", ["a layer", "the role"])
def test_a_merge_that_is_not_the_role_never_takes_its_name(tmp_path, monkeypatch, spoil):
    flow = trained("sd 1.5 guided")
    before = {name: value.clone() for name, value in flow.denoiser.state_dict().items()}
    if spoil == "a layer":
        read = merging.read_back

        def spoilt(*args):
            fresh = read(*args)
            with torch.no_grad():
                fresh.conv_in.weight[0, 0, 0, 0] += 1e-3
            return fresh

        monkeypatch.setattr(merging, "read_back", spoilt)
    else:
        honest = merging.merged
        monkeypatch.setattr(merging, "merged", lambda roles, role: {name: value + 0.01 for name, value in honest(roles, role).items()})
    with pytest.raises(
        RuntimeError, match="conv_in.weight is not what was trained" if spoil == "a layer" else "does not behave like the trained"
    ):
        merging.merge(flow, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged.rejected"]
    assert all(torch.equal(value, before[name]) for name, value in flow.denoiser.state_dict().items())


def test_merged_weights_that_a_precision_cannot_hold_are_refused():
    flow = trained("sd 1.5 guided", pipe=pipeline("sd 1.5 guided").to(torch.float16))
    with torch.no_grad():
        next(iter(flow.roles.parameters("current").values())).fill_(1e30)
    with pytest.raises(ValueError, match=r"merged weights of .* are not finite in torch.float16"):
        merging.merged(flow.roles, "current")


def test_all_weights_tell_what_they_were_trained_on(tmp_path):
    flow = build("sd 1.5 guided", lora=None)
    flow.save(tmp_path / "weights", notes={"base_model": "owner/base", "seed": "7"})
    assert lora_files.notes_of(tmp_path / "weights") == {"base_model": "owner/base", "seed": "7"}
    again = type(flow.pipe).from_pretrained(tmp_path / "weights", safety_checker=None)
    assert all(torch.equal(value, flow.denoiser.state_dict()[name]) for name, value in again.unet.state_dict().items())
    with pytest.raises(FileNotFoundError, match="no LoRA there"):
        lora_files.notes_of(tmp_path)


def test_pixels_that_differ_are_never_saved(tmp_path, monkeypatch):
    flow = trained("sd 1.5 guided")
    own = loaded_back.own_images
    monkeypatch.setattr(loaded_back, "own_images", lambda *args: own(*args).flip(-1))
    with pytest.raises(RuntimeError, match="makes another picture than the trained weights"):
        flow.save(tmp_path / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.rejected"]


@pytest.mark.parametrize("case", ["z_image guided", "sdxl guided"])
def test_half_precision_saves_and_decodes(case, tmp_path):
    flow = build(case, pipe=pipeline(case).to(torch.bfloat16))
    flow.save(tmp_path / "weights")
    images = flow.decode(parity.subject(flow).run(ode(5)).x0)
    own = own_images(flow, flow.pipe, parity.PROMPT, parity.subject(flow).noise, 5).float()
    assert (images - own).abs().mean() < 0.02


def test_a_lora_of_another_base_is_named(tmp_path, monkeypatch):
    flow = trained("sd 1.5 guided")
    monkeypatch.setattr(lora_files, "fingerprint", lambda roles: "")  # as files of before were written
    flow.save(tmp_path / "weights", notes={"base_model": "owner/other"})
    monkeypatch.undo()
    again = build("sd 1.5 guided")
    again.pipe.register_to_config(_name_or_path="owner/this")
    with pytest.warns(UserWarning, match="was trained on owner/other, and is loaded into this"):
        again.load_lora(tmp_path / "weights")
    wider = build("sd 1.5 guided", lora=LoRA(rank=4, alpha=8, targets=("to_q",)))
    with pytest.raises(ValueError, match="not a LoRA of these layers"):
        wider.load_lora(tmp_path / "weights")


def test_the_shipped_pipeline_has_the_name_that_configurations_give_it(tmp_path):
    assert lora_files._name_of(str(shapes_folder())) == "shapes"
    assert lora_files._name_of("owner/model/") == "model"
    (tmp_path / "mine").mkdir()
    assert lora_files._name_of(str(tmp_path / "mine")) == "mine"
    assert lora_files._name_of("") == ""


def test_a_lora_of_a_float16_base_is_taken_by_the_same_base_in_float32(tmp_path, monkeypatch):
    """Rounded to float16 first, the same weights have another fingerprint: a warning is all that another name gets."""
    monkeypatch.setattr(lora_files, "compare_behaviour", lambda *args, **options: None)  # which a CPU is slow at
    half = trained("sd 1.5", pipe=pipeline("sd 1.5").to(torch.float16))
    half.save(tmp_path / "weights", notes={"base_model": "owner/base"})
    assert lora_files.notes_of(tmp_path / "weights")["base_dtype"] == "float16"
    flow = build("sd 1.5")
    assert fingerprint(flow.roles) != fingerprint(half.roles)
    flow.load_lora(tmp_path / "weights")
    assert all(torch.equal(value, half.roles.parameters("current")[name]) for name, value in flow.roles.parameters("current").items())
    other = build("sd 1.5")
    other.pipe.register_to_config(_name_or_path="models/another")
    with pytest.warns(UserWarning, match="was trained on owner/base, and is loaded into another"):
        other.load_lora(tmp_path / "weights")


def test_parts_beside_the_denoiser_are_compared_too(tmp_path, monkeypatch):
    flow, write = build("sd 1.5", lora=None), lora_files.write_pipeline

    def spoilt(pipeline, network, folder, notes):
        write(pipeline, network, folder, notes)
        path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors["decoder.conv_in.bias"] += 1e-3
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(lora_files, "write_pipeline", spoilt)
    with pytest.raises(loaded_back.NotAsTrained, match=r"vae: decoder.conv_in.bias is not what was trained"):
        flow.save(tmp_path / "weights")


def test_adapters_of_layers_that_nothing_reads_are_left_out_of_what_others_wrote(tmp_path):
    flow = trained("qwen_image")
    own = {f"transformer.{name}": value.clone() for name, value in flow.roles.lora_state_dict("current").items()}
    place = "transformer.transformer_blocks.1.attn.to_add_out"
    others = {f"{place}.lora_A.weight": torch.ones(4, 32), f"{place}.lora_B.weight": torch.ones(32, 4)}
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": list(flow.family.targets)}
    (tmp_path / "weights").mkdir()
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    save_file(own | others, tmp_path / "weights" / lora_files.LORA_FILE, metadata=metadata)
    again = build("qwen_image")
    again.load_lora(tmp_path / "weights")
    mine = flow.roles.parameters("current")
    assert all(torch.equal(value, mine[name]) for name, value in again.roles.parameters("current").items())
