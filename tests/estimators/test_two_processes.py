"""Two real processes: each holds half of the samples, both gather, and both get what one process gets, to the last bit."""

import dataclasses
import datetime

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flowalign.estimators import RewardBatch, config, estimate, names
from tests.estimators.worlds import world


def batch_for(name):
    """A batch of binary rewards, which every recipe takes, with the tables that the recipe needs."""
    claims = config(name).claims
    groups = torch.arange(24) * 7 % 5
    binary = (torch.rand(24, claims.num_rewards, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    whole = world(1, rewards=binary, groups=groups)
    needs = {*claims.needs, *(["clauses_valid"] if "clauses" in claims.needs else [])}
    unneeded = {field.name: None for field in dataclasses.fields(whole) if field.default is None and field.name not in needs}
    return dataclasses.replace(whole, **unneeded)


def gather(rows):
    """Collect the rows of all ranks; ranks may hold different numbers of them."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return {name: torch.cat([part[name] for part in parts]) for name in rows}


def work(rank, ranks, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=60)
    )
    found = {}
    for name in names():
        whole = batch_for(name)
        columns = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
        rows = {column: value[rank::ranks] for column, value in columns.items() if isinstance(value, torch.Tensor)}
        if whole.tree is not None:
            rows["leaf"] = whole.tree.leaf_of_sample[rank::ranks]
        everyone = gather(rows)
        leaf = everyone.pop("leaf", None)
        tree = whole.tree and dataclasses.replace(whole.tree, leaf_of_sample=leaf)
        result = estimate(name, RewardBatch(**everyone, tree=tree))
        mine = torch.argsort(everyone["sample_uid"])
        found[name] = (result.advantage[mine], result.weight[mine], result.keep[mine])
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_a_batch_gathered_over_two_processes_gives_the_same_bits_as_in_one(tmp_path):
    mp.spawn(work, args=(2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name in names():
        result = estimate(name, batch_for(name))
        for found in (ranks[0][name], ranks[1][name]):
            for part, expected in zip(found, (result.advantage, result.weight, result.keep), strict=True):
                assert torch.equal(part, expected), name
