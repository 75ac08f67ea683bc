"""The card beside the weights: what the hub reads of it, the run's own numbers, and nothing of this machine."""

import ast
from types import SimpleNamespace

import diffusers
import pytest
import yaml
from PIL import Image

from flowalign import model_card, run
from flowalign.core.plans import ode
from flowalign.pipelines import parity
from flowalign.run_config import load_config
from flowalign.train.journal import read_log
from tests.pipelines import families


def test_the_card_tells_base_scores_settings_and_shows_pictures(write_config, model, tmp_path):
    rewards = [{"reward": "tests.train.brightness"}, {"reward": {"type": "shapes", "strict": 0.0}, "weight": 0.0}]
    train = {"groups": 2, "group_size": 4, "sample_every": 2}
    path = write_config("card", steps=12, rewards=rewards, train=train, metrics=["novelty"])
    config = load_config(str(path))
    run.run_training(config)
    folder = config.output / "weights"
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(head)
    assert about == {"base_model": "sd3", "library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["lora", "flowalign"]}
    assert str(tmp_path) not in text
    assert 'from_pretrained("sd3")\npipe.load_lora_weights(' in text
    assert "num_inference_steps=4, height=32, width=32, guidance_scale=1.0, max_sequence_length=16).images[0]" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    log = read_log(config.output / "log.jsonl")
    assert rows[0][:2] == ["step", "brightness"]
    assert "novelty (measured)" in rows[0]
    assert len(rows) == 1 + 10
    assert (rows[1][0], rows[-1][0]) == ("1", "12")
    for row in rows[1:]:
        line = log[int(row[0]) - 1]
        assert row[rows[0].index("brightness")] == f"{line['reward']['brightness']:.4f}"
        assert row[rows[0].index("novelty (measured)")] == f"{line['metric']['novelty']:.4f}"
    assert "only watched: rewards[1] of the settings below" in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["algorithm"]["type"] == "awm"
    assert settings["train"]["group_size"] == 4
    assert "output" not in settings
    assert "After 12 steps" in text
    for name, source in (("samples.png", "step_000012.png"), ("samples_base.png", "base.png")):
        assert f"]({name})" in text
        with Image.open(folder / name) as one, Image.open(config.output / "samples" / source) as two:
            assert one.tobytes() == two.tobytes()


def test_all_weights_are_no_lora_and_a_run_without_pictures_shows_none(write_config, model):
    pipeline = {"type": "sd3", "model": str(model), "num_steps": 4, "max_sequence_length": 16, "lora": None}
    path = write_config("whole", steps=1, pipeline=pipeline, train={"groups": 2, "group_size": 4, "sample_every": 0, "learning_rate": 1e-5})
    config = load_config(str(path))
    run.run_training(config)
    text = (config.output / "weights" / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["tags"] == ["flowalign"]
    assert "All weights of `sd3` after 1 steps of awm" in text
    assert "load_lora_weights" not in text
    assert "## Samples" not in text


def keywords(call):
    return {entry.arg: ast.literal_eval(entry.value) for entry in call.keywords}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["sd 1.5 guided", "sdxl guided", "flux true guidance", "qwen_image guided", "auto sana"])
def test_the_cards_code_makes_the_runs_images(case):
    config = SimpleNamespace(pipeline=families.settings(case), algorithm=None)
    flow = families.build(case)
    it = parity.subject(flow)
    lines = {
        line.partition(" = ")[0]: line.partition(" = ")[2] for line in model_card._usage(config, "base", flow, is_lora=True).splitlines()
    }
    pipe = families.pipeline(case)
    if "pipe.scheduler" in lines:
        call = ast.parse(lines["pipe.scheduler"], mode="eval").body
        kind = getattr(diffusers, ast.unparse(call.func).partition(".")[0])
        given = keywords(call)
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **given) if call.args else kind(**given)
    call = ast.parse(lines["image"].removesuffix(".images[0]"), mode="eval").body
    given = {"latents": flow.packing.unpacked(it.noise), "num_images_per_prompt": 2, "output_type": "pt"}
    written = pipe(parity.PROMPT, **keywords(call), **given).images
    made = flow.decode(it.run(ode(5)).x0)
    assert (written - made).abs().max() < 1e-4
    assert made.std() > 0.05
