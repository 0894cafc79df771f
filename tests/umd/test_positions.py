"""Tables of positions at another size."""

import torch

from umd.positions import resized_positions, sincos_positions


def test_rows_stay_rows_and_columns_columns():
    """The same grid gives the same bits; a table of rows alone stays one, in order, and so do columns."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    table = torch.stack([rows, columns, torch.full_like(rows, 0.3)], -1).flatten(0, 1)  # [L, 3]
    assert torch.equal(resized_positions(table, (8, 6), (8, 6)), table)
    row, column, constant = resized_positions(table, (8, 6), (16, 12)).unflatten(0, (16, 12)).unbind(-1)
    torch.testing.assert_close(constant, torch.full((16, 12), 0.3))
    torch.testing.assert_close(row, row[:, :1].expand(16, 12))
    torch.testing.assert_close(column, column[:1].expand(16, 12))
    assert (row[2:-2, 0].diff() > 0).all() and (column[0, 2:-2].diff() > 0).all()
    torch.testing.assert_close(row + row.flip(0), torch.full((16, 12), 7.0))  # symmetric about the middle


def test_columns_come_first():
    """MAE's table: the first half of a row tells the column, the second the row."""
    table = sincos_positions((2, 3), 8).view(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4]) and torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    expected = torch.tensor([2.0, 0.02]).double()
    torch.testing.assert_close(table[0, 2, :4], torch.cat([expected.sin(), expected.cos()]).float())
