"""The types of signals: what a chain of stages is checked against before it sees a number.

A signal is a table ``[rows, rewards]``. Its *kind* says four things that the shape alone does not:

=============  =====================================  ==================================================
axis           values                                 meaning
=============  =====================================  ==================================================
``rows``       ``sample``, ``node``, ``step``         one row per image, per tree node, per (image, step)
``rewards``    ``several``, ``one``                   one column per reward, or already combined
``phase``      ``reward``, ``centred``, ``scaled``,   how far the signal is on its way to an advantage
               ``calibrated``
``magnitude``  ``free``, ``rewards``, ``groups``,     what was weighed on purpose: rewards against one another,
               ``common``                             groups against one another, or everything by one factor
=============  =====================================  ==================================================

A magnitude that was chosen is undone by what comes after it and does not see sizes: the standard deviation of each reward undoes every one,
that of all samples a common factor, ranks and signs all of them. Such an order is refused. Combining rewards makes their weights safe.

A stage declares per axis what it takes and gives: ``phase="reward -> centred"``, ``rows="sample | step"``.
"""

import dataclasses
from dataclasses import dataclass

from flowalign.estimators.spelling import unknown

AXES = {
    "rows": ("sample", "node", "step"),
    "rewards": ("several", "one"),
    "phase": ("reward", "centred", "scaled", "calibrated"),
    "magnitude": ("free", "rewards", "groups", "common"),
}

_ADVICE = {
    ("rewards", "one"): "combine the rewards before it (combine_rewards, combine_advantages)",
    ("rewards", "several"): "rewards are combined once only",
    ("phase", "reward"): "put it before the baseline",
    ("phase", "centred"): "put exactly one baseline before it (center, leave_one_out)",
    ("rows", "step"): "give credit to the steps before it (broadcast_steps)",
    ("magnitude", "free"): "weigh after it: standard deviations, ranks and signs undo weights given before them",
}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Type of a signal; the default is what every chain starts from: raw rewards per sample."""

    rows: str = "sample"
    rewards: str = "several"
    phase: str = "reward"
    magnitude: str = "free"

    def __str__(self) -> str:
        """Write the kind as it appears in messages and in ``explain``."""
        weighed = {"rewards": ", weighed by reward", "groups": ", weighed by group", "common": ", weighed by a common factor"}
        return f"{self.phase}, {self.rewards} per {self.rows}{weighed.get(self.magnitude, '')}"


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a stage takes and gives on each axis; an empty axis is left alone.

    Examples:
        >>> center = Signature(phase="reward -> centred")
        >>> print(center(Kind()))
        centred, several per sample
        >>> center(Kind(phase="scaled"))
        Traceback (most recent call last):
        TypeError: takes phase 'reward', but got phase 'scaled': put it before the baseline
    """

    rows: str = ""
    rewards: str = ""
    phase: str = ""
    magnitude: str = ""

    def __post_init__(self) -> None:
        """Refuse words that no axis knows.

        Raises:
            ValueError: If an axis is declared with an unknown word.
        """
        for axis, words in AXES.items():
            takes, gives = self._axis(axis)
            for word in (*takes, *([gives] if gives else [])):
                if word not in words:
                    raise ValueError(f"signature, axis {axis}: {unknown('word', word, words)}")

    def __call__(self, kind: Kind) -> Kind:
        """Return the kind that comes out when ``kind`` goes in.

        Raises:
            TypeError: If the stage does not take ``kind``.
        """
        given = {}
        for axis, got in dataclasses.asdict(kind).items():
            takes, gives = self._axis(axis)
            if takes and got not in takes:
                wanted = " or ".join(map(repr, takes))
                advice = next((f": {_ADVICE[axis, t]}" for t in takes if (axis, t) in _ADVICE), "")
                raise TypeError(f"takes {axis} {wanted}, but got {axis} {got!r}{advice}")
            given[axis] = gives or got
        return Kind(**given)

    def _axis(self, axis: str) -> tuple[tuple[str, ...], str]:
        declared = {"rows": self.rows, "rewards": self.rewards, "phase": self.phase, "magnitude": self.magnitude}
        takes, _, gives = declared[axis].partition("->")
        return tuple(word.strip() for word in takes.split("|") if word.strip()), gives.strip()


START = Kind()
"""Every chain starts from raw rewards per sample."""

END = Signature(rows="step", rewards="one", phase="centred | scaled | calibrated")
"""Every chain ends with one compared number per sample and step."""
