"""Files of every family load in a bare diffusers pipeline and make the same pictures."""

import pytest
import torch

from flowalign.core.plans import ode
from flowalign.pipelines import loaded_back, lora_files, parity
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
    assert notes == {"base_model": "owner/base", "seed": "7"}
    assert lora_files.settings(tmp_path / "weights")[:2] == (4, 8.0)
    again = build(case)
    again.load_lora(tmp_path / "weights")
    assert torch.equal(again.decode(parity.subject(again).run(ode(5)).x0), made)


def test_a_merged_pipeline_needs_no_adapter(tmp_path):
    flow = trained("sd 1.5 guided")
    lora_files.merge(flow, tmp_path / "merged")
    it = parity.subject(flow)
    merged = type(flow.pipe).from_pretrained(tmp_path / "merged", safety_checker=None)
    merged.set_progress_bar_config(disable=True)
    assert not any("lora" in name for name, _ in merged.unet.named_modules())
    assert (own_images(flow, merged, parity.PROMPT, it.noise, 5) - flow.decode(it.run(ode(5)).x0)).abs().max() < 1e-4
    # The pipeline that was merged from is what it was.
    assert flow.roles.num_layers == 32
    with pytest.raises(ValueError, match="no adapters; its weights are whole"):
        lora_files.merge(build("sd 1.5", lora=None), tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


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
