"""Which worker this is, as the launchers say."""

from __future__ import annotations

import pytest

import partials as pt
from partials.distribute.ranks import Place, place


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Place()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(3, 8, 1)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Place(2, 4, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Place()),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}, Place(2, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, Place(1, 2)),
        ({"JOB_COMPLETION_INDEX": "1", "JOB_COMPLETIONS": "2"}, Place(1, 2)),
    ],
)
def test_places(environment, expected):
    assert place(environment) == expected


@pytest.mark.parametrize("environment", [{"RANK": "3"}, {"RANK": "3", "WORLD_SIZE": "3"}, {"RANK": "x", "WORLD_SIZE": "3"}])
def test_variables_that_do_not_fit(environment):
    with pytest.raises(pt.InputError, match="variables of torchrun do not fit"):
        place(environment)
