"""What a stage says when a batch lacks a table that it works with."""

from torch import Tensor

from flowalign.estimators.batch import RewardBatch, Tree

_MEND = {
    "clauses": "[batch, C], one column per verifiable sub-check",
    "clauses_valid": "[batch, C] bool, which of the sub-checks a prompt has",
    "metric": "[batch, M], one column per side measurement, for example each image's mean distance to the others of its group",
    "log_prob": "[batch, T], the mean log-probs of the trained steps; use transitions with noise (std above 0)",
    "step_rewards": "[batch, T, R], a reward for every trained step",
    "anchor_id": "[batch, T] int64, equal where samples share a state, as they do under common initial noise or a common prefix",
    "baseline": "[batch, R], for example the rewards of the ODE samples from the same noise",
}


def need(batch: RewardBatch, table: str, stage: str) -> Tensor:
    """Return a table of the batch.

    Args:
        batch: The batch.
        table: Name of the field.
        stage: Who asks, for the message.

    Raises:
        ValueError: If the batch does not have it; says what to give.
    """
    value: Tensor | None = vars(batch)[table]
    if value is None:
        raise ValueError(f"{stage} needs RewardBatch.{table}: give {_MEND[table]}, or choose a recipe without it")
    return value


def need_tree(batch: RewardBatch, stage: str) -> Tree:
    """Return the batch's tree.

    Raises:
        ValueError: If there is none.
    """
    if batch.tree is None:
        raise ValueError(f"{stage} needs RewardBatch.tree: give the Tree of a branching rollout, or choose a recipe without it")
    return batch.tree


def need_column(batch: RewardBatch, table: str, column: int, stage: str) -> Tensor:
    """Return one column of ``rewards`` or ``metric``.

    Raises:
        ValueError: If the table or the column is missing.
    """
    values = batch.rewards if table == "rewards" else need(batch, table, stage)
    if not 0 <= column < values.shape[1]:
        raise ValueError(f"{stage}: column {column} of {table} does not exist, the batch has {values.shape[1]} (0 is the first)")
    return values[:, column]
