"""The types of signals: what a chain of stages is checked against before it sees a number.

A signal is a table ``[rows, rewards]``. Its *kind* says three things that the shape alone does not, and what was done to it on purpose:

=============  =====================================  ==================================================
axis           values                                 meaning
=============  =====================================  ==================================================
``rows``       ``sample``, ``node``, ``step``         one row per image, per tree node, per (image, step)
``rewards``    ``several``, ``one``                   one column per reward, or already combined
``phase``      ``reward``, ``centred``, ``scaled``,   how far the signal is on its way to an advantage
               ``calibrated``, ``probability``
``marks``      any of ``rewards``, ``groups``,        weighed: rewards or groups against one another, or everything by one
               ``common``, ``shaped``, ``weights``,   factor; rewards reshaped; weights or targets beside the rows; ratios
               ``targets``                            to reach among them
=============  =====================================  ==================================================

Some marks are undone by what does not see sizes: the standard deviation of each reward undoes every factor, that of all samples a common one,
ranks and signs all of them. Some stages read rewards of the batch as they came, or make new rows. Such orders are refused: they would leave an
option without effect. Combining rewards makes their weights safe.

A stage declares per axis what it takes and gives (``phase="reward -> centred"``, ``rows="sample | step"``), and which marks it refuses, adds and drops.
"""

from dataclasses import dataclass

from flowalign.estimators.spelling import unknown

AXES = {
    "rows": ("sample", "node", "step"),
    "rewards": ("several", "one"),
    "phase": ("reward", "centred", "scaled", "calibrated", "probability"),
}
_UNDOES = "standard deviations, ranks and signs undo weights given before them: weigh after it"
MARKS = {
    "rewards": _UNDOES,
    "groups": _UNDOES,
    "common": _UNDOES,
    "shaped": "it reads rewards of the batch as they came: shape nothing before it",
    "weights": "it makes new rows, whose samples' weights and targets would be lost: give those at the end",
    "targets": "ratios to reach are given once",
}
"""Marks, and the advice where one is refused."""
FACTORS = "rewards | groups | common"

_ADVICE = {
    ("rewards", "one"): "combine the rewards before it (combine_rewards, combine_advantages)",
    ("rewards", "several"): "rewards are combined once only",
    ("phase", "reward"): "put it before the baseline",
    ("phase", "centred"): "put exactly one baseline before it (center, leave_one_out)",
    ("rows", "step"): "give credit to the steps before it (broadcast_steps)",
}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Type of a signal; the default is what every chain starts from: raw rewards per sample."""

    rows: str = "sample"
    rewards: str = "several"
    phase: str = "reward"
    marks: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """Write the kind as it appears in messages."""
        marks = f" ({', '.join(sorted(self.marks))})" if self.marks else ""
        return f"{self.phase}, {self.rewards} per {self.rows}{marks}"


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a stage takes and gives on each axis, and which marks it refuses, adds and drops; what is empty is left alone.

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
    refuses: str = ""
    adds: str = ""
    drops: str = ""

    def __post_init__(self) -> None:
        """Refuse words that no axis knows.

        Raises:
            ValueError: If an axis is declared with an unknown word, or a mark is unknown.
        """
        for axis, words in AXES.items():
            takes, gives = self._axis(axis)
            for word in (*takes, *([gives] if gives else [])):
                if word not in words:
                    raise ValueError(f"signature, axis {axis}: {unknown('word', word, words)}")
        for marks in (self.refuses, self.adds, self.drops):
            for mark in _words(marks):
                if mark not in MARKS:
                    raise ValueError(f"signature: {unknown('mark', mark, MARKS)}")

    def __call__(self, kind: Kind) -> Kind:
        """Return the kind that comes out when ``kind`` goes in.

        Raises:
            TypeError: If the stage does not take ``kind``.
        """
        given = {}
        for axis in AXES:
            got = str(vars(kind)[axis])
            takes, gives = self._axis(axis)
            if takes and got not in takes:
                wanted = " or ".join(map(repr, takes))
                advice = next((f": {_ADVICE[axis, t]}" for t in takes if (axis, t) in _ADVICE), "")
                raise TypeError(f"takes {axis} {wanted}, but got {axis} {got!r}{advice}")
            given[axis] = gives or got
        for mark in _words(self.refuses):
            if mark in kind.marks:
                raise TypeError(f"does not take a signal marked {mark!r}: {MARKS[mark]}")
        marks = (kind.marks | frozenset(_words(self.adds))) - frozenset(_words(self.drops))
        return Kind(rows=given["rows"], rewards=given["rewards"], phase=given["phase"], marks=marks)

    def _axis(self, axis: str) -> tuple[tuple[str, ...], str]:
        takes, _, gives = {"rows": self.rows, "rewards": self.rewards, "phase": self.phase}[axis].partition("->")
        return _words(takes), gives.strip()


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split("|") if word.strip())


START = Kind()
"""Every chain starts from raw rewards per sample."""

END = Signature(rows="step", rewards="one", phase="centred | scaled | calibrated | probability")
"""Every chain ends with one compared number per sample and step."""
