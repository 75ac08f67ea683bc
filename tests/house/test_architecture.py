"""Who may import whom, and what may not stand anywhere."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A module may import its own floor's group and the groups named here.
GROUND = {"core", "estimators", "shapes"}
ALLOWED = {
    "core": {"core"},
    "estimators": {"estimators", "core"},
    "shapes": {"shapes", "core"},
    "algorithms": {"algorithms", *GROUND},
    "pipelines": {"pipelines", *GROUND},
    "rewards": {"rewards", "plugins", "images", *GROUND},
    "evaluate": {"evaluate", "algorithms", "pipelines", "rewards", "images", "files", *GROUND},
    "train": {"train", "evaluate", "algorithms", "pipelines", "rewards", "images", "files", *GROUND},
}
TORCH_ONLY = {"core", "estimators", "algorithms"}
# The networks and their pretraining stand on the top floor, in the folder of the world that they serve.
TOP = {"flowalign/shapes/models.py", "flowalign/shapes/pretrain.py"}


def sources():
    files = [*(ROOT / "flowalign").rglob("*.py"), *(ROOT / "pipelines").glob("*.py"), *(ROOT / "rewards").glob("*.py")]
    seen = {path.resolve(): path.resolve().relative_to(ROOT) for path in files}
    return sorted(seen.values())


def imports(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name


def group_of(path):
    parts = path.parts
    return parts[0] if parts[0] in ("pipelines", "rewards") else parts[1] if len(parts) > 2 else None


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_point_down_only(path):
    group = group_of(path)
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] in ("pipelines", "rewards", "configs"):
            pytest.fail(f"{path}:{line}: spell it flowalign.{module}")
        if group not in ALLOWED or str(path) in TOP or parts[0] != "flowalign" or len(parts) < 2:
            continue
        known = parts[1] in ALLOWED or (ROOT / "flowalign" / f"{parts[1]}.py").is_file()
        assert not known or parts[1] in ALLOWED[group], f"{path}:{line}: {group} may not import flowalign.{parts[1]}"


@pytest.mark.parametrize("path", [path for path in sources() if group_of(path) in TORCH_ONLY], ids=str)
def test_the_mathematics_imports_torch_alone(path):
    for line, module in imports(path):
        top = module.split(".")[0]
        assert top in {"torch", "jaxtyping", "flowalign"} | set(sys.stdlib_module_names), f"{path}:{line}: imports {module}"


def test_rewards_never_import_diffusers_and_checkpoints_are_written_by_train_alone():
    for path in sources():
        for line, module in imports(path):
            if group_of(path) == "rewards":
                assert not module.startswith("diffusers"), f"{path}:{line}"
            if group_of(path) not in ("train", "benchmark", None):  # the top floor
                assert not module.startswith("flowalign.train"), f"{path}:{line}"


def test_nothing_unsafe_stands_anywhere():
    unsafe = re.compile(
        r"pickle\.load|torch\.load\((?!.*weights_only=True)|weights_only=False|(?<![\w.])eval\(|(?<![\w.])exec\(|shell=True|os\.system"
    )
    for path in sources():
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
            assert not unsafe.search(line), f"{path}:{number}: {line.strip()}"


def test_the_package_list_equals_the_tree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in (ROOT / "flowalign").rglob("__init__.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {
        "flowalign.pipelines",
        "flowalign.rewards",
        "flowalign.configs",
    }
    assert listed == found


@pytest.mark.parametrize("name", ["pipelines", "rewards", "configs"])
def test_the_links_are_relative_and_resolve(name):
    link = ROOT / "flowalign" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    assert (link / "__init__.py").is_file()


def test_configurations_are_short_and_decode():
    from flowalign.benchmark.spec import load_benchmark
    from flowalign.run_config import load_config

    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert files
    for path in files:
        assert len(path.read_text().splitlines()) <= 45, path
        load_benchmark(path, []) if path.stem.startswith("benchmark_") else load_config(str(path))


def test_the_table_of_algorithms_has_each_files_length_and_most_are_short():
    table = (ROOT / "docs" / "algorithms.md").read_text()
    told = {name: int(lines) for name, lines in re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", table, re.MULTILINE)}
    files = {path.stem: len(path.read_text().splitlines()) for path in (ROOT / "flowalign" / "algorithms").glob("*.py")}
    assert told == {name: files[name] for name in files if name not in ("__init__", "f_distill", "dmd2")}
    assert sum(length <= 60 for length in told.values()) > len(told) / 2
