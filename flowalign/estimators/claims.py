"""What a recipe claims of itself; one generic test checks each claim, and that each unclaimed one has a counter-example."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Claims:
    """Invariances of a recipe.

    Attributes:
        shift: Adding one constant to all rewards changes nothing.
        shift_per_group: Adding a constant to each group changes nothing.
        scale: Multiplying all rewards by a positive number changes nothing (up to eps).
        zero_mean: Advantages of each group sum to 0.
        monotone: Within a group a higher reward never gets a lower advantage.
        local: A group's advantages do not depend on other groups.
        zero_when_flat: A flat group gets exactly 0.
    """

    shift: bool
    shift_per_group: bool
    scale: bool
    zero_mean: bool
    monotone: bool
    local: bool
    zero_when_flat: bool
