import pytest
import yaml

from tests.pipelines import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture
def write_config(model, tmp_path):
    """Write a small run's configuration; keyword arguments replace whole top-level keys."""

    def write(name="run", **changes):
        config = {
            "seed": 0,
            "steps": 3,
            "output": str(tmp_path / name),
            "pipeline": {"type": "sd3", "model": str(model), "num_steps": 4, "max_sequence_length": 16, "lora": {"rank": 4, "alpha": 8}},
            "rewards": [{"reward": {"type": "shapes", "strict": 0.0}}, {"reward": "tests.train.brightness"}],
            "algorithm": {"type": "awm", "levels": "uniform", "num_levels": 2, "num_minibatches": 2, "reference_penalty": 0.1},
            "train": {"groups": 2, "group_size": 4, "micro_batch_size": 8, "learning_rate": 1e-2},
            **changes,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write
