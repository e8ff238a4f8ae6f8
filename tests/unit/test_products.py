"""Products of rows with rows, mirrored where both sides are the same."""

import pytest
import torch

from partials._products import WHOLE, rows_by_rows


@pytest.mark.parametrize("count", [3, WHOLE, WHOLE + 1, 2 * WHOLE + 1])
@pytest.mark.parametrize("grad", [False, True])
def test_a_product_with_itself(count, grad):
    rows = torch.randn(count, 7, dtype=torch.float64).requires_grad_(grad)
    torch.testing.assert_close(rows_by_rows(rows, rows), rows @ rows.T)
    strided = rows.repeat(1, 2)[:, ::2]
    torch.testing.assert_close(rows_by_rows(strided, strided), strided @ strided.T)


def test_other_rows_of_the_same_memory_are_not_taken_for_the_same():
    rows = torch.randn(2 * WHOLE, 2 * WHOLE, dtype=torch.float64)
    torch.testing.assert_close(rows_by_rows(rows, rows.T), rows @ rows)
    torch.testing.assert_close(rows_by_rows(rows[:-1], rows[1:]), rows[:-1] @ rows[1:].T)
