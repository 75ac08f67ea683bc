"""What a recipe claims of itself; one generic test checks each claim, and that each unclaimed one has a counter-example."""

from dataclasses import dataclass
from typing import Literal

Domain = Literal["any", "binary", "unit", "at_most_one", "non_negative"]


@dataclass(frozen=True, kw_only=True)
class Claims:
    """Invariances of a recipe with its default options, and what it works with.

    They are about what training multiplies the gradient of a kept sample by: the advantage times the weight.

    Attributes:
        shift: Adding one constant to all rewards changes nothing.
        shift_per_group: Adding a constant to each group changes nothing.
        scale: Multiplying all rewards by a positive number changes nothing (up to eps).
        zero_mean: Advantages of each group sum to 0.
        monotone: Within a group a sample with higher rewards never gets a lower advantage.
        local: A group's advantages do not depend on other groups.
        zero_when_flat: A flat group gets exactly 0.
        domain: Rewards that it takes; others raise.
        needs: Tables of the batch that it needs besides rewards and ids.
        num_rewards: How many rewards it is for; 1 if it adds up whatever there is.
        filters: Whether it may drop samples that could be scored.
    """

    shift: bool
    shift_per_group: bool
    scale: bool
    zero_mean: bool
    monotone: bool
    local: bool
    zero_when_flat: bool
    domain: Domain = "any"
    needs: tuple[str, ...] = ()
    num_rewards: int = 1
    filters: bool = False


INVARIANCES = ("shift", "shift_per_group", "scale", "zero_mean", "monotone", "local", "zero_when_flat")
"""The claims that the generic test decides."""
