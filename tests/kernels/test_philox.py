"""Philox: published vectors, Triton's own numbers, statistics, and elements independent of the shape."""

import math

import pytest
import torch
from scipy import stats

from umd.kernels.philox import (
    philox_randn,
    philox_randn4x,
    philox_randn_rows,
    philox_randn_samples,
    philox_uint32x4,
    random_words,
)

# philox4x32 10 in kat_vectors of github.com/DEShawResearch/random123: counter, key, output.
KNOWN_ANSWERS = [
    "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]

# tl.randn4x(seed, counter) of triton 3.7.1, run by its interpreter.
TRITON_COUNTERS = [0, 1, 2**32 - 1, 2**32 + 5]
TRITON_RANDN4X = {
    0: [
        [0.046551529318094254, 0.6699951887130737, 0.2741977274417877, -1.0954265594482422],
        [-0.3883614242076874, -2.373033285140991, 0.8850517272949219, 0.445284366607666],
        [-1.2274311780929565, -0.2571263313293457, -0.9476451277732849, 1.7478747367858887],
        [-0.897537887096405, 0.20321837067604065, 2.5303938388824463, -0.30321770906448364],
    ],
    1234567890123: [
        [0.9200432300567627, -0.6228081583976746, 0.5011975169181824, 0.6436507105827332],
        [-0.06480741500854492, 0.0320766381919384, -0.04780837148427963, 1.1286994218826294],
        [1.7454167604446411, 1.9025442600250244, -0.7601539492607117, 0.033534884452819824],
        [-1.0784441232681274, 0.000665592378936708, 0.402065634727478, 0.2621568739414215],
    ],
}


def words(numbers: list[int]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([number]) for number in numbers)


def philox_by_python_ints(counter: list[int], key: list[int]) -> list[int]:
    """The definition of Salmon et al. 2011 in integers that cannot overflow."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("line", KNOWN_ANSWERS)
def test_known_answers(line):
    numbers = [int(word, 16) for word in line.split()]
    out = philox_uint32x4(words(numbers[:4]), words(numbers[4:6]))
    assert [int(word) for word in out] == numbers[6:]


def test_words_equal_those_of_unbounded_integers():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(2**32, (6, 500), generator=generator)
    numbers[:, :64] = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])[torch.randint(5, (6, 64), generator=generator)]
    out = torch.stack(philox_uint32x4(tuple(numbers[:4]), tuple(numbers[4:])))
    for column, result in zip(numbers.T.tolist(), out.T.tolist(), strict=True):
        assert result == philox_by_python_ints(column[:4], column[4:])


@pytest.mark.parametrize("seed", TRITON_RANDN4X)
def test_equals_triton(seed):
    out = philox_randn4x(seed, torch.tensor(TRITON_COUNTERS))
    torch.testing.assert_close(out, torch.tensor(TRITON_RANDN4X[seed]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", [0, 7, -3, 2**40 + 2**31, 2**63 - 1])
def test_seed_as_tensor_and_all_its_bits_matter(seed):
    noise = philox_randn(seed, (64,))
    assert torch.equal(noise, philox_randn(torch.tensor(seed), (64,)))
    for bit in (0, 31, 32, 62):
        assert (philox_randn(seed ^ (1 << bit), (64,)) != noise).float().mean() > 0.9


def test_moments_and_distribution():
    noise = philox_randn(1, (1000, 1000)).double()
    n = noise.numel()
    assert abs(noise.mean()) < 4 / math.sqrt(n)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((noise**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert 4.5 < noise.abs().max() < 5.7  # P(|x| > 4.5) = 7e-6; Box-Muller ends at √(-2 log 1e-7)
    # The uniform number has 2**31 values, so a test on 1e5 numbers sees a continuous distribution.
    assert stats.kstest(noise.flatten()[:100_000].numpy(), "norm").pvalue > 0.01
    for lag in (1, 2, 3, 4, 1000):  # 1 to 3 are lanes of one counter, 4 the next counter
        a, b = noise.flatten()[:-lag], noise.flatten()[lag:]
        assert abs((a * b).mean()) < 4 / math.sqrt(n)
        assert abs((a**2 * b**2).mean() - 1) < 4 * math.sqrt(8 / n)


def test_neighbouring_seeds_are_uncorrelated():
    streams = torch.stack([philox_randn(seed, (50_000,)) for seed in range(8)])
    off_diagonal = torch.corrcoef(streams) - torch.eye(8)
    assert off_diagonal.abs().max() < 5 / math.sqrt(50_000)


def test_elements_are_numbered_across_shapes_and_offsets():
    whole = philox_randn(3, (4, 3, 10))
    assert torch.equal(whole.flatten(), philox_randn(3, (120,)))
    assert torch.equal(whole.flatten()[:37], philox_randn(3, (37,)))
    assert torch.equal(whole.flatten()[40:], philox_randn(3, (80,), offset=10))
    assert torch.equal(whole.flatten()[40:], philox_randn(3, (80,), offset=torch.tensor(10)))
    assert torch.equal(whole.double(), philox_randn(3, (4, 3, 10), dtype=torch.float64))
    assert philox_randn(3, (0, 5)).shape == (0, 5)


def test_rows_do_not_depend_on_their_batch():
    offsets = torch.tensor([0, 2, 2**32, 5 << 32])
    rows = philox_randn_rows(9, offsets, (3, 5))
    for row, offset in zip(rows, offsets, strict=True):
        assert torch.equal(row, philox_randn(9, (3, 5), offset=offset))
    assert torch.equal(rows[1:3], philox_randn_rows(9, offsets[1:3], (3, 5)))


def test_samples_have_seeds_of_their_own():
    seeds = torch.tensor([3, 2**40, 3])
    noise = philox_randn_samples(seeds, (3, 7))
    for sample, seed in zip(noise, seeds, strict=True):
        assert torch.equal(sample, philox_randn(seed, (3, 7)))


@pytest.mark.parametrize("count", [1, 4, 261])
def test_random_words_are_philox_words(device, count):
    """Of counter (j // 4, 0, sample, step) under the seed, in integers that cannot overflow."""
    seed, step, samples = 2**62 + 2**33 + 5, 2**32 + 9, [0, 1, 77, 2**31 + 3]
    found = random_words(seed, torch.tensor(step, device=device), torch.tensor(samples, device=device), count)
    assert found.shape == (4, count) and found.dtype == torch.int64
    for sample, row in zip(samples, found.tolist(), strict=True):
        counters = [[j, 0, sample, step % 2**32] for j in range((count + 3) // 4)]
        words = [word for c in counters for word in philox_by_python_ints(c, [seed % 2**32, seed >> 32])]
        assert row == words[:count]


def test_random_words_of_small_seeds(device):
    """1 is a constant to Triton, and 0 a number of 32 bits."""
    step, samples = torch.tensor(0, device=device), torch.arange(2, device=device)
    for seed in (0, 1, 16, 2**31):
        expected = philox_by_python_ints([0, 0, 1, 0], [seed, 0])
        assert random_words(seed, step, samples, 4)[1].tolist() == expected
    assert random_words(0, step, samples[:0], 4).shape == (0, 4)


def test_random_words_refuse_by_name():
    step, samples = torch.tensor(0), torch.arange(2)
    for args, name in (((-1, step, samples), "seed"), ((0, samples, samples), "step"), ((0, step, step), "samples")):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            random_words(*args, 4)


def test_registered_operator():
    torch.library.opcheck(torch.ops.umd.philox_randn4x.default, (torch.tensor(5), torch.arange(6).view(2, 3)))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_compiles_whole(as_tensor):
    compiled = torch.compile(lambda seed: philox_randn(seed, (2, 3, 7)) * 2, fullgraph=True)
    for seed in (3, 4, 2**62):
        given = torch.tensor(seed) if as_tensor else seed
        assert torch.equal(compiled(given), philox_randn(seed, (2, 3, 7)) * 2)
