"""Options of `umd bench`: the names that they take are the keys of the tables that the benchmarks use."""

import pytest

pytest.importorskip("triton", reason="the benchmarks of kernels need Triton: pip install triton")

from umd.bench import audit, audit_step, kernels, liger_cases, loader, op_cases, options  # noqa: E402


def test_names_are_those_of_the_tables():
    for names, table in (
        (options.SHAPES, op_cases.SHAPES),
        (options.OPS, op_cases.OPS),
        (options.LIGER_OPS, liger_cases.CASES),
        (options.NETWORKS, audit_step.NETWORKS),
        (options.ARCHITECTURES, audit.BANDWIDTHS),
        (options.STREAMS, kernels.STREAMS),
        (options.GROUPS, loader.GROUPS),
    ):
        assert names == tuple(table)
