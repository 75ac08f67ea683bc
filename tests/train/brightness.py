"""A reward for tests that differs between any two images: the mean brightness."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Scores:
    values: dict
    clauses: None = None
    clauses_valid: None = None


@dataclass(frozen=True, kw_only=True)
class Config:
    broken: str = ""
    binary: bool = False

    def build(self):
        return Reward(self)


@dataclass(frozen=True)
class Reward:
    config: Config
    calls: list = field(default_factory=list)

    def __call__(self, images, prompts, metadata):
        values = images.double().mean((1, 2, 3))
        if self.config.binary:
            values = (values > values.median()).double()
        if self.config.broken == "nan":
            values[1] = float("nan")
        if self.config.broken == "two":
            values[:2] = float("nan")
        if self.config.broken == "length":
            values = values[1:]
        if self.config.broken == "list":
            return values.tolist()
        return Scores(values={"brightness": values})
