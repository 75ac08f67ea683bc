import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from flowalign import config, data, plugins
from flowalign.config import ConfigError, Plugin, decode, encode, override
from flowalign.run_config import PromptsConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)
    mode: Literal["fast", "slow"] = "fast"


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int
    inner: Inner = Inner()
    reward: Annotated[Any, Plugin("rewards")] = None
    name: str | None = None
    flag: bool = False


def test_a_configuration_comes_back_as_it_was_written():
    written = {
        "steps": 3,
        "inner": {"rate": 1e-4, "sizes": [4], "mode": "slow"},
        "reward": {"type": "shapes", "strict": 0.25},
        "name": "x",
    }
    decoded = decode(Outer, written)
    assert decoded.inner == Inner(rate=1e-4, sizes=(4,), mode="slow")
    assert decoded.reward.strict == 0.25
    assert decode(Outer, encode(decoded)) == decoded
    assert encode(decoded)["reward"] == {"type": "shapes", "strict": 0.25}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"stesp": 3}, "stesp: unknown key; did you mean 'steps'"),
        ({}, "steps: missing, and has no default"),
        ({"steps": 3, "inner": {"raet": 1}}, "inner.raet: unknown key; did you mean 'rate'"),
        ({"steps": "three"}, "steps: needs int, got 'three'"),
        ({"steps": True}, "steps: needs int, got True"),
        ({"steps": 3, "flag": "yes"}, "flag: needs bool, got 'yes'"),
        ({"steps": 3, "inner": {"mode": "slwo"}}, "inner.mode: got 'slwo', needed one of fast, slow; did you mean 'slow'"),
        ({"steps": 3, "inner": {"sizes": 4}}, "inner.sizes: needs a list"),
        ({"steps": 3, "inner": {"sizes": [1, "b"]}}, r"inner.sizes\[1\]: needs int"),
        ({"steps": 3, "inner": 5}, "inner: needs a mapping"),
        ({"steps": 3, "reward": {"type": "shaeps"}}, "reward.type: unknown type 'shaeps' of rewards: did you mean 'shapes'"),
        ({"steps": 3, "reward": {"strict": 1}}, "reward: needs a mapping with a 'type'"),
        ({"steps": 3, "reward": {"type": "shapes", "strict": 7}}, "reward: strict: got 7"),
        ({"steps": 3, "reward": {"type": "no.such.module"}}, "no module 'no.such.module'"),
    ],
)
def test_a_mistake_is_answered_with_its_place_and_the_nearest_word(written, message):
    with pytest.raises(ConfigError, match=message):
        decode(Outer, written)


def test_overrides_reach_into_mappings_lists_and_short_forms():
    written = {"a": {"b": 1}, "algorithm": "awm", "rewards": [{"weight": 1}]}
    found = override(written, ["--a.b", "2", "--algorithm.num_levels", "3", "--rewards.0.weight=0.5"])
    assert found == {"a": {"b": 2}, "algorithm": {"type": "awm", "num_levels": 3}, "rewards": [{"weight": 0.5}]}
    assert written["a"] == {"b": 1}
    for arguments, message in (
        (["--a"], "needs a value"),
        (["a", "1"], "needed an override"),
        (["--rewards.4.weight", "1"], "not one of the list's"),
    ):
        with pytest.raises(ConfigError, match=message):
            override(written, arguments)


def test_yaml_that_gives_a_key_twice_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("steps: 1\nsteps: 2\n")
    with pytest.raises(ConfigError, match="'steps' is given twice"):
        config.read_yaml(path)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="needs a mapping"):
        config.read_yaml(path)
    with pytest.raises(FileNotFoundError, match="no such configuration file"):
        config.read_yaml(tmp_path / "b.yaml")


def test_yaml_cannot_make_objects(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("steps: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.read_yaml(path)


def test_plugins_are_the_files_that_define_a_config():
    assert {"shapes", "pickscore", "clip_score", "jpeg_size"} <= set(plugins.available("rewards"))
    assert not {"clip", "pixels", "plain", "weights"} & set(plugins.available("rewards"))
    assert {"awm", "flow_grpo"} <= set(plugins.available("algorithms"))
    assert "base" not in plugins.available("pipelines")
    for kind in plugins.KINDS:
        for name, text in plugins.available(kind).items():
            assert text.endswith("."), f"{kind} {name}: {text!r}"
            plugins.load(kind, name)


def test_a_missing_optional_package_says_how_to_get_it():
    with pytest.raises(ImportError, match=r"pip install 'flowalign-diffusion\[ocr\]'"):
        plugins.require("no_such_package", "ocr")


def test_records_in_a_file_of_plain_prompts_are_no_prompts(tmp_path):
    lines = tmp_path / "a.txt"
    lines.write_text('a cat\n{"prompt": "a dog"}\n')
    with pytest.raises(ValueError, match=r"a.txt, line 2: a JSON object in a file of plain prompts; rename the file to .jsonl"):
        data.read_prompts(lines)
    lines.write_text("{a cat} and {braces}\n")
    assert [prompt.text for prompt in data.read_prompts(lines)] == ["{a cat} and {braces}"]


def test_prompt_files_keep_every_line_and_number_the_broken_one(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\ufeffa red ring\n\n\u7ea2\u8272\u7684\u5706\na red ring\n", encoding="utf-8")
    prompts = data.read_prompts(text)
    assert [prompt.text for prompt in prompts] == ["a red ring", "\u7ea2\u8272\u7684\u5706", "a red ring"]
    assert len({prompt.uid for prompt in prompts}) == 3
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"prompt": "a", "tag": "x"}) + "\n{broken\n")
    with pytest.raises(ValueError, match="line 2: not a JSON object"):
        data.read_prompts(lines)
    lines.write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(ValueError, match="line 1: needs an object with a non-empty string 'prompt'"):
        data.read_prompts(lines)
    text.write_text("\n")
    with pytest.raises(ValueError, match="no prompts there"):
        data.read_prompts(text)
    with pytest.raises(ValueError, match=r"end in .txt"):
        (tmp_path / "a.csv").write_text("x")
        data.read_prompts(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match="no such prompt file"):
        data.read_prompts(tmp_path / "b.txt")


@pytest.mark.parametrize("num", [3, 4, 10])
def test_prompts_are_drawn_in_passes_that_any_step_can_be_entered_at(num):
    prompts = data.number([{"prompt": str(i)} for i in range(10)], "here")
    drawn = [data.draw(prompts, seed=1, step=step, num=num) for step in range(10)]
    flat = [prompt.text for step in drawn for prompt in step]
    for start in range(0, len(flat) - 9, 10):
        assert len(set(flat[start : start + 10])) == 10
    assert data.draw(prompts, seed=1, step=7, num=num) == drawn[7]
    assert flat[:10] != flat[10:20]


def tagged(**sizes):
    return data.number([{"prompt": f"{tag} {i}", "tag": tag} for tag, size in sizes.items() for i in range(size)], "here")


@pytest.mark.parametrize("num", [1, 4, 5, 12])
def test_tags_come_in_their_proportions_whatever_number_of_prompts_they_have(num):
    weights = {"few": 1, "many": 3, "left": 2, "none": 0}
    sets = data.by_tag(tagged(few=2, many=50, left=4, none=3), weights)
    drawn = [data.draw_by_tag(sets, weights, seed=1, step=step, num=num) for step in range(60 // num)]
    assert data.draw_by_tag(sets, weights, seed=1, step=3, num=num) == drawn[3]
    flat = [prompt.text for step in drawn for prompt in step]
    for start in range(0, 60, 6):
        tags = [text.split()[0] for text in flat[start : start + 6]]
        assert [tags.count(tag) for tag in ("few", "many", "left", "none")] == [1, 3, 2, 0]
    few, many = ([text for text in flat if text.startswith(tag)] for tag in ("few", "many"))
    assert all(few[i] != few[i + 1] for i in range(0, 10, 2))  # passes without replacement
    assert len(set(many)) == len(many) == 30
    assert flat[:12] != flat[12:24]


def test_proportions_that_do_not_fit_the_prompts_are_refused():
    prompts = tagged(a=2, b=1)
    with pytest.raises(ValueError, match="'b' has prompts but no weight"):
        data.by_tag(prompts, {"a": 1})
    with pytest.raises(ValueError, match="'c' is not a tag of these prompts; the tags are a, b"):
        data.by_tag(prompts, {"a": 1, "b": 1, "c": 1})
    with pytest.raises(ValueError, match="prompt 'x' has no 'tag'"):
        data.by_tag([*prompts, *data.number([{"prompt": "x"}], "here")], {"a": 1, "b": 1})
    for weights, message in (({"a": -1}, "a: got -1"), ({"a": 0.5}, "a: got 0.5"), ({"a": 0}, "all are 0")):
        with pytest.raises(ValueError, match=message):
            PromptsConfig(tag_weights=weights)


def flowalign(*arguments):
    return subprocess.run([sys.executable, "-m", "flowalign", *arguments], capture_output=True, text=True, check=False)


def test_the_command_line_lists_plugins_without_importing_torch():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from flowalign.cli import main; main(['list', 'algorithms']); assert 'torch' not in sys.modules",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "awm" in done.stdout


def test_errors_of_the_command_line_are_one_message_and_exit_with_two():
    done = flowalign("train", "no_such_config")
    assert done.returncode == 2
    assert done.stderr.startswith("flowalign: no_such_config: no such file")
    assert "Traceback" not in done.stderr


def test_every_command_explains_itself():
    done = flowalign("--help")
    assert done.returncode == 0
    for command in ("demo", "train", "evaluate", "sample", "list", "env"):
        assert command in done.stdout
    assert "Example: flowalign evaluate shapes --lora runs/demo" in flowalign("evaluate", "--help").stdout
