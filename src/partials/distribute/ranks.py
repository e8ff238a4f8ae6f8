"""Which worker am I? As torchrun, SLURM or Kubernetes say in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .._errors import InputError


@dataclass(frozen=True)
class Place:
    """Worker `rank` of `world`, the `local`th on its machine (None where nobody says)."""

    rank: int = 0
    world: int = 1
    local: int | None = None


RANKED = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("a SLURM array", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", ""),
    ("a Kubernetes indexed job", "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", ""),
)
"""(who sets them, variable of the rank, of the number of workers, of the rank on this machine), the first that is set counts."""


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """This worker's place; alone where no launcher says otherwise.

    Raises
    ------
    InputError
        where a rank is set without the number of workers, or they do not fit.
    """
    for who, rank, world, local in RANKED:
        if rank not in environment or (who == "SLURM" and environment.get(world, "1") == "1"):
            continue  # (a SLURM job of one task may be a member of an array)
        try:
            number, size = int(environment[rank]), int(environment[world])
            first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0")) if who == "a SLURM array" else 0
            found = Place(number - first, size, int(environment[local]) if environment.get(local) else None)
            if not 0 <= found.rank < found.world:
                raise ValueError
        except (KeyError, ValueError):
            raise InputError(
                f"the variables of {who} do not fit",
                got=f"{rank}={environment.get(rank)}, {world}={environment.get(world)}",
                expected=f"{world} workers, numbered from 0 by {rank}",
            ) from None
        return found
    return Place()
