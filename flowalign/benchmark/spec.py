"""What a benchmark compares: methods, seeds, a budget, and the small search that every method gets."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flowalign import config as configuration
from flowalign.config import ConfigError
from flowalign.core.distillation import Settings
from flowalign.core.schedules import linear_sigmas
from flowalign.evaluate.suites import Suite, check_name, suite
from flowalign.run import estimator_of
from flowalign.run_config import RunConfig, load_config
from flowalign.suite_options import given_options, suite_options
from flowalign.train.rehearsal import rehearse

Unit = Literal["evaluations", "flops", "seconds"]
UNITS: tuple[Unit, ...] = ("evaluations", "flops", "seconds")
PREVIOUS = "previous"
Phase = Literal["base", "search", "final"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much every run may spend on sampling and training; exactly one is given.

    Attributes:
        evaluations: Rows through the denoiser: one image at one noise level, forward. Rows that are also differentiated cost three.
        flops: Floating-point operations of the denoiser, counted on the real module.
        seconds: Wall time of the steps. Evaluation is not counted. Compare within one machine, one run at a time.
    """

    evaluations: float | None = None
    flops: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuse none or several."""
        given = [unit for unit in UNITS if vars(self)[unit] is not None]
        if len(given) != 1:
            raise ValueError(f"budget: got {' and '.join(given) or 'nothing'}, needed exactly one of {', '.join(UNITS)}")
        if not vars(self)[given[0]] > 0:
            raise ValueError(f"budget.{given[0]}: got {vars(self)[given[0]]}, needed a positive number")

    @property
    def unit(self) -> Unit:
        """The unit that is given."""
        return next(unit for unit in UNITS if vars(self)[unit] is not None)

    @property
    def amount(self) -> float:
        """How much of it."""
        return float(vars(self)[self.unit])


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """What models are scored on; the options are those of ``flowalign evaluate``.

    Attributes:
        name: Name of a suite.
        num_prompts: How many prompts.
        images_per_prompt: Images of each.
        measure: The score that methods are compared by; null for the suite's own: "strict" of "shapes", "official" of "geneval". The suite "prompts"
            has its rewards, by name.
        split: Prompts of "shapes" or "geneval".
        detector: Of "geneval".
        clip: Of "geneval".
        prompts: File of "prompts".
        reward: Rewards of "prompts", or measured besides of "shapes", each as YAML text: ``clip_score`` or ``{type: pickscore, model: FOLDER}``. One that no method is trained on
            is a check that a method cannot have flattered.
    """

    name: str = "shapes"
    num_prompts: int = 120
    images_per_prompt: int = 2
    measure: str | None = None
    split: str | None = None
    detector: str | None = None
    clip: str | None = None
    prompts: Path | None = None
    reward: tuple[str, ...] | None = None

    @property
    def headline(self) -> str:
        """The score that methods are compared by."""
        return self.measure or ("official" if self.name == "geneval" else "strict")

    def options(self) -> dict[str, Any]:
        """Return the options as the command line knows them."""
        return {key: getattr(self, key) for key in ("split", "detector", "clip", "prompts", "reward")}

    def check(self) -> None:
        """Refuse suites that there are not and options of others; nothing is loaded.

        Raises:
            ConfigError: If it cannot be meant.
        """
        try:
            check_name(self.name)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        given_options(self.name, self.options(), "suite.")
        least = 3 if self.name == "shapes" else 2
        if self.images_per_prompt < 2 or self.num_prompts < least:
            raise ConfigError(
                f"suite: got num_prompts {self.num_prompts} and images_per_prompt {self.images_per_prompt}, needed at least {least} and 2: diversity within a "
                "prompt and the distance to other images are a part of every comparison"
            )
        if self.name == "prompts" and self.measure is None:
            raise ConfigError("suite.measure: is needed by suite prompts: the name of the reward that methods are compared by")

    def build(self) -> Suite:
        """Make it; models of judges are loaded here."""
        chosen = suite_options(self.name, self.num_prompts, self.options())
        return suite(self.name, num_prompts=self.num_prompts, images_per_prompt=self.images_per_prompt, **chosen)


@dataclass(frozen=True, kw_only=True)
class Search:
    """The same small search for every method; it never sees the suite.

    Attributes:
        grid: Values to try of each dotted configuration key; all combinations are tried.
        share: Part of the budget that each trial gets.
        seed: Training seed of the trials; not one of the benchmark's.
    """

    grid: dict[str, list[Any]] = field(default_factory=dict)
    share: float = 0.25
    seed: int = 1000

    def __post_init__(self) -> None:
        """Refuse shares that are none and empty lists."""
        if not 0 < self.share <= 1:
            raise ValueError(f"share: got {self.share}, needed a part in (0, 1]")
        for key, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"grid.{key}: got {values!r}, needed a list of values to try")

    def points(self) -> list[dict[str, Any]]:
        """Return all combinations; one that changes nothing where there is no grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def edges(self, point: Mapping[str, Any]) -> list[str]:
        """Name the keys whose value is the smallest or largest of at least three numbers tried: beyond it there may be a better one.

        Examples:
            >>> Search(grid={"rate": [1e-4, 1e-3, 1e-2], "depth": [1, 2]}).edges({"rate": 1e-2, "depth": 1})
            ['rate']
        """
        numeric = {key: values for key, values in self.grid.items() if all(type(value) in (int, float) for value in values)}
        return [key for key, values in numeric.items() if len(set(values)) > 2 and point[key] in (min(values), max(values))]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run, apart from all others.

    Attributes:
        method: Whose.
        phase: The base model's evaluation, a trial of the search, or a run that counts.
        base: Configuration that it starts from.
        overrides: Dotted keys and values on top.
        seed: Training seed.
        unit, amount: What may be spent.
        milestones: In how many equal parts of it the model is scored; 0 for never.
        suite: What it is scored on.
        settings: Digest of the resolved training configuration.
        reference: Key of the base that it is compared with: models that sample alike share one.
    """

    method: str
    phase: Phase
    base: str
    overrides: dict[str, Any]
    seed: int
    unit: Unit
    amount: float
    milestones: int
    suite: SuiteConfig
    settings: str
    reference: str

    @property
    def name(self) -> str:
        """Folder of the cell: it changes with whatever changes the result."""
        if self.phase == "base":
            return f"base/{self.reference}"
        parts = {key: value for key, value in self.written().items() if key not in ("base", "overrides")}  # how the settings are written
        return f"{_slug(self.method)}/{self.phase}_seed{self.seed}_{_digest(parts)}"

    def written(self) -> dict[str, Any]:
        """Return the cell as JSON has it."""
        found: dict[str, Any] = configuration.encode(self)
        return found

    def arguments(self, output: Path) -> list[str]:
        """Return the overrides as command-line words."""
        return _words({**self.overrides, "seed": self.seed, "output": str(output)})


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """A benchmark.

    Attributes:
        output: Folder of cells and report.
        base: Training configuration that methods start from.
        common: What all methods change: dotted keys of the training configuration. A method's own changes come on top.
        methods: Name of each method and what it changes: dotted keys, or ``base`` for another configuration.
        seeds: Training seeds.
        budget: What every run may spend.
        milestones: Times that a run is scored, at equal parts of the budget.
        suite: What models are scored on.
        search: The search that every method gets first.
        target: Score whose price is reported; null for none.
        reference: Method that the others are compared with; null for the first, "previous" for the one before each, as a study of one factor at a
            time wants it.
    """

    output: Path = Path("runs/benchmark")
    base: str
    common: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]]
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: Budget
    milestones: int = 4
    suite: SuiteConfig = SuiteConfig()
    search: Search = field(default_factory=Search)
    target: float | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        if not self.methods:
            raise ValueError("methods: got none, needed at least one")
        slugs = [_slug(name) for name in self.methods]
        twice = next((name for name in self.methods if slugs.count(_slug(name)) > 1), None)
        if twice is not None:
            raise ValueError(f"methods: {twice!r} and another name would share a folder; name them apart by letters or digits")
        if "base" in self.common:
            raise ValueError("common.base: is the benchmark's own key base")
        if self.reference not in (None, PREVIOUS, *self.methods):
            raise ValueError(f"reference: got {self.reference!r}, needed {PREVIOUS} or one of {', '.join(self.methods)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: got {list(self.seeds)}, needed different ones, at least three to speak of a spread")
        if self.search.grid and self.search.seed in self.seeds:
            raise ValueError(f"search.seed: {self.search.seed} is one of the seeds; a search on them would favour what it tried")
        if self.milestones < 1:
            raise ValueError(f"milestones: got {self.milestones}, needed at least 1")

    def check(self) -> None:
        """Decode every configuration that will run, and rehearse a step of it: a mistake is found now and not in the last cell.

        Raises:
            ConfigError: Names the method.
        """
        self.suite.check()
        for method in self.methods:
            for point in self.search.points():
                try:
                    cell = self.final(method, point, self.seeds[0])
                    _rehearse(load_config(cell.base, cell.arguments(self.output)))
                except (ValueError, FileNotFoundError) as error:
                    raise ConfigError(f"methods.{method}: {error}") from error

    def bases(self) -> list[Cell]:
        """The evaluations of the models before training, one for all methods that sample alike."""
        cells = [self._cell(method, "base", {}, seed=0, amount=0.0, milestones=0) for method in self.methods]
        return list({cell.reference: cell for cell in reversed(cells)}.values())[::-1]

    def trials(self, method: str) -> list[Cell]:
        """The trials of a method's search; none where there is no choice."""
        points = self.search.points()
        amount = self.budget.amount * self.search.share
        return [
            self._cell(method, "search", point, seed=self.search.seed, amount=amount, milestones=0) for point in points if len(points) > 1
        ]

    def final(self, method: str, point: Mapping[str, Any], seed: int) -> Cell:
        """A run that counts, at the point that the search chose."""
        return self._cell(method, "final", point, seed=seed, amount=self.budget.amount, milestones=self.milestones)

    def _cell(self, method: str, phase: Phase, point: Mapping[str, Any], *, seed: int, amount: float, milestones: int) -> Cell:
        changes = dict(self.methods[method])
        base = str(changes.pop("base", self.base))
        overrides = {**self.common, **changes, **point}
        settings = configuration.encode(load_config(base, _words(overrides)))
        pipeline = {key: value for key, value in settings["pipeline"].items() if key != "lora"}
        pipeline["contents"] = _contents(Path(pipeline["model"]))
        scored = {**configuration.encode(self.suite), "contents": None if self.suite.prompts is None else _contents(self.suite.prompts)}
        asked = [_contents(Path(settings["prompts"]["source"])), pipeline, scored]
        return Cell(
            method=method,
            phase=phase,
            base=base,
            overrides=overrides,
            seed=seed,
            unit=self.budget.unit,
            amount=amount,
            milestones=milestones,
            suite=self.suite,
            # The seed and the folder are the cell's own; a run stops by its budget and not by its steps.
            settings=_digest([{key: value for key, value in settings.items() if key not in ("seed", "output", "steps")}, asked]),
            # All that the images of an untrained model depend on.
            reference=_digest([pipeline, scored]),
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def _contents(path: Path) -> Any:
    """Return what tells other contents apart: of a file its hash; of a folder its small files' hashes, and the sizes and times of weights."""
    if path.is_dir():
        files = sorted(inner for inner in path.rglob("*") if inner.is_file())
        return [[str(inner.relative_to(path)), _contents(inner)] for inner in files]
    if not path.is_file():
        return None  # a name
    about = path.stat()
    return _hash(path, about.st_size, about.st_mtime_ns) if about.st_size < _SMALL else [about.st_size, about.st_mtime_ns]


_SMALL = 2**26


@functools.cache
def _hash(path: Path, size: int, changed: int) -> str:
    """Hash a file once for every cell that asks; size and time tell that it is still the same."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _rehearse(config: RunConfig) -> None:
    """Let the algorithm refuse what it cannot do, on a straight grid of the pipeline's number of steps."""
    if isinstance(config.algorithm, Settings):
        return
    sigmas = linear_sigmas(config.pipeline.num_steps)
    rehearse(
        config.algorithm.build(),
        sigmas,
        groups=config.train.groups,
        group_size=config.train.group_size,
        gives_targets=estimator_of(config).gives_targets,
    )


def _words(values: Mapping[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", json.dumps(value))]


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name).strip("_") or "_"


def load_benchmark(path: Path, overrides: list[str]) -> BenchmarkConfig:
    """Read, override, decode and check a benchmark.

    Raises:
        ConfigError: If it cannot be meant.
    """
    raw = configuration.override(configuration.read_yaml(path), overrides)
    try:
        decoded: BenchmarkConfig = configuration.decode(BenchmarkConfig, raw)
        decoded.check()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return decoded
