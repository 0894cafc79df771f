"""The objective: the paper's formulas written out with loops, and what the random draws must be like."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from scipy.stats import binomtest, chisquare
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from umd.config import OBJECTIVES, ModelConfig, ObjectiveConfig
from umd.errors import UserError
from umd.masking import layout, num_keep
from umd.model import UMD
from umd.objective import Objective, Part
from umd.ops import patchify, philox_randn_samples
from umd.schedule import NoiseSchedule

CPU = torch.device("cpu")
TINY = ModelConfig(
    image_size=(8, 8), patch_size=2, hidden_size=16, depth=1, decoder_depth=1, num_heads=2, num_classes=5
)
NO_ADALN = ModelConfig(
    image_size=(4, 12),
    channels=2,
    patch_size=2,
    hidden_size=16,
    depth=1,
    decoder_depth=1,
    num_heads=2,
    adaLN=False,
)


def randomised(config, dtype=torch.float64):
    model, generator = UMD(config).to(dtype), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def images(config, B, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(B, config.channels, *config.image_size, generator=generator, dtype=torch.float64)
    return (2 * x - 1).to(dtype)


def alpha_bar(t, T=1000):
    """ᾱ(t) of the cosine schedule in model time: ᾱ(0) = 1, ᾱ(t) = Π_{s<t} (1 - β_s)."""

    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return math.prod(1 - min(1 - f((s + 1) / T) / f(s / T), 0.999) for s in range(t))


def plain_loss(model, x_start, corruption, eps):
    """Corruption and loss of the paper: each sample corrupted, predicted and scored by itself, by windows."""
    config, P = model.config, model.config.patch_size
    C, L, B, n = config.channels, config.num_patches, len(x_start), corruption.num_noised
    across = config.grid_size[1]
    windows = [
        (slice(i // across * P, i // across * P + P), slice(i % across * P, i % across * P + P)) for i in range(L)
    ]
    errors = {"eps": [], "x0": [], "clean": []}
    for s in range(B):
        visible = [i - s * L for i in corruption.ids_keep.tolist() if i // L == s]
        hidden = [i for i in range(L) if i not in visible]
        t = corruption.timesteps[s].item() if s < n else 0
        label = None
        if config.num_classes:
            given = corruption.labels is not None and s < n
            label = torch.tensor([corruption.labels[s].item() if given else config.num_classes])
        x_t = x_start[s]
        if s < n:
            x_t = math.sqrt(alpha_bar(t)) * x_start[s] + math.sqrt(1 - alpha_bar(t)) * eps[s]
        patches = torch.stack([x_t[:, rows, columns].flatten() for rows, columns in (windows[i] for i in visible)])
        alone = layout(config, (len(visible),), None, CPU)
        prediction = model(patches, torch.tensor(visible), alone, torch.tensor([t]), label)
        both = prediction.view(L, 2, C, P, P)
        for i, (rows, columns) in enumerate(windows):
            x0_error = (both[i, 0] - x_start[s, :, rows, columns]) ** 2
            if s >= n and i in hidden:
                errors["clean"].append(x0_error)
            if s < n and (i in visible):
                errors["eps"].append((both[i, 1] - eps[s, :, rows, columns]) ** 2)
            if s < n and (i in hidden or not hidden):
                errors["x0"].append(x0_error)
    parts = [torch.stack(e).mean() if e else torch.zeros((), dtype=torch.float64) for e in errors.values()]
    r0 = (B - n) / B
    return (1 - r0) * 0.5 * (parts[0] + parts[1]) + r0 * parts[2], torch.stack(parts).detach()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("config", [TINY, NO_ADALN], ids=["adaLN", "no adaLN"])
def test_equals_the_formulas(name, config):
    """At the settings of MAE, MaskDiT, DiT and UMD: loss, parts and the gradient of every parameter."""
    model, B = randomised(config), 5
    objective = Objective(config, OBJECTIVES[name], NoiseSchedule("cosine"))
    x_start = images(config, B)
    labels = torch.tensor([0, 4, 2, 1, 3]) if config.num_classes else None
    corruption = objective.corrupt(B, seed=7, device=CPU, labels=labels)
    n = {"umd": 3, "mae": 0, "maskdit": 5, "dit": 5}[name]
    assert corruption.num_noised == n
    eps = philox_randn_samples(corruption.noise, x_start.shape[1:], dtype=torch.float64)

    total, parts = objective(model, x_start, corruption)
    expected, expected_parts = plain_loss(model, x_start, corruption, eps)
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(parts, expected_parts, rtol=1e-11, atol=1e-11)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(loss, parameters, materialize_grads=True) for loss in (total, expected))
    for parameter, a, b in zip(names, ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max().clamp(min=1), parameter


@pytest.mark.parametrize("name, adaLN", [("umd", True), ("umd", False), ("mae", False), ("dit", True)])
def test_gradcheck(name, adaLN):
    """The gradient of the whole step against finite differences, in a random direction of all parameters."""
    config = ModelConfig(
        image_size=(4, 4),
        channels=1,
        patch_size=2,
        hidden_size=4,
        depth=1,
        decoder_depth=1,
        num_heads=1,
        mlp_ratio=1,
        adaLN=adaLN,
        embedding="released",
    )
    model, x_start = randomised(config), images(config, 2)
    objective = Objective(config, OBJECTIVES[name], NoiseSchedule("cosine"))
    corruption = objective.corrupt(2, seed=3, device=CPU)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        def call(*args):
            return torch.func.functional_call(model, dict(zip(names, values, strict=True)), args)

        return objective(call, x_start, corruption)[0]

    assert torch.autograd.gradcheck(loss, parameters, fast_mode=True)


def test_published_settings():
    assert OBJECTIVES["umd"] == ObjectiveConfig(0.5, 0.375, 0.75, 0.1)
    assert (OBJECTIVES["mae"].no_noise_prob, OBJECTIVES["mae"].mask_ratio_no_noise) == (1, 0.75)
    assert (OBJECTIVES["maskdit"].no_noise_prob, OBJECTIVES["maskdit"].mask_ratio) == (0, 0.5)
    assert (OBJECTIVES["dit"].no_noise_prob, OBJECTIVES["dit"].mask_ratio) == (0, 0)
    # 64 and 160 of 256 patches visible (paper, Sec. 5)
    assert [num_keep(256, m) for m in (0.75, 0.375, 0.5, 0.0)] == [64, 160, 128, 256]


@pytest.mark.parametrize(
    "B, r0, clean", [(256, 0.5, 128), (256, 0.05, 12), (7, 0.5, 3), (4, 0, 0), (4, 1, 4), (1, 1, 1), (2, 0.5, 1)]
)
def test_the_first_samples_are_noised(B, r0, clean):
    objective = Objective(TINY, ObjectiveConfig(no_noise_prob=r0), NoiseSchedule())
    assert objective.split(B) == (B - clean, clean)
    corruption = objective.corrupt(B, 0, CPU)
    rows = corruption.layout.patches.cond_index
    assert (corruption.timesteps[rows][: B - clean] >= 1).all() and (corruption.timesteps[rows][B - clean :] == 0).all()
    assert len(corruption.timesteps) == B - clean + (clean > 0)  # one condition for all noise-free samples
    lengths = corruption.layout.patches.cu_seqlens.diff().tolist()
    assert lengths == [10] * (B - clean) + [4] * clean


def test_times_are_uniform():
    """Model time 1..T, both ends included."""
    objective = Objective(TINY, OBJECTIVES["dit"], NoiseSchedule("cosine", num_steps=20))
    t = torch.cat([objective.corrupt(50, seed, CPU).timesteps for seed in range(200)])
    counts = t.bincount(minlength=21)
    assert counts[0] == 0 and len(counts) == 21
    assert chisquare(counts[1:]).pvalue > 0.001


def test_masks_are_uniform_and_independent():
    """Every ordered pair of 4 patches equally often; nothing shared by two masks, or by mask and time."""
    config = ModelConfig(image_size=(4, 4), patch_size=2, hidden_size=16, depth=1, decoder_depth=1, num_heads=2)
    objective = Objective(config, OBJECTIVES["maskdit"], NoiseSchedule("cosine", num_steps=4))
    draws = [objective.corrupt(2, seed, CPU) for seed in range(4000)]
    ids = torch.stack([c.ids_keep for c in draws]).view(-1, 2, 2) % 4  # [draws, samples, 2 visible]
    pairs = (ids[:, 0, 0] * 4 + ids[:, 0, 1]).bincount(minlength=16).view(4, 4)
    assert (pairs.diagonal() == 0).all()
    assert chisquare(pairs[~torch.eye(4, dtype=torch.bool)]).pvalue > 0.001
    assert chisquare((ids[:, 0, 0] * 4 + ids[:, 1, 0]).bincount(minlength=16)).pvalue > 0.001
    times = torch.stack([c.timesteps for c in draws])
    assert chisquare((ids[:, 0, 0] * 4 + times[:, 0] - 1).bincount(minlength=16)).pvalue > 0.001
    assert len({seed for c in draws for seed in c.noise.tolist()}) == 8000


@pytest.mark.parametrize("B, r0", [(16, 0.5), (48, 0.05), (24, 0.3), (16, 1.0), (16, 0.0)])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_parts_of_a_step_are_the_whole(B, r0, count):
    """Any number of ranks and micro-batches: together every sample once, with the draws that it has in the whole
    batch; the mean of their losses and gradients is that of the whole, and so are the parts in the logs."""
    model, x_start, labels = randomised(TINY), images(TINY, B), torch.arange(B) % 5
    objective = Objective(TINY, ObjectiveConfig(no_noise_prob=r0, class_dropout_prob=0.3), NoiseSchedule("cosine"))
    parameters, names = list(model.parameters()), [name for name, _ in model.named_parameters()]

    def run(part):
        places = objective.places(B // part.count, part)
        c = objective.corrupt(len(places), 11, CPU, labels[places], step=torch.tensor(3), part=part)
        loss, parts = objective(model, x_start[places], c)
        weighted = parts * torch.tensor(objective.part_weights(len(places), part), dtype=torch.float64)
        return places, c, [loss, weighted, *torch.autograd.grad(loss, parameters, materialize_grads=True)]

    (_, whole, expected), runs = run(Part()), [run(Part(i, count)) for i in range(count)]
    clean = int(B * r0)
    assert sorted(place for places, *_ in runs for place in places) == list(range(B))
    for places, c, _ in runs:
        n = c.num_noised
        assert abs(n - (B - clean) / count) < 1 and [place < B - clean for place in places] == [
            s < n for s in range(len(places))
        ]
        for name in ("timesteps", "labels", "noise"):
            assert torch.equal(getattr(c, name)[:n], getattr(whole, name)[places[:n]]), name
        L = TINY.num_patches
        of_sample = [set((whole.ids_keep[whole.ids_keep // L == place] % L).tolist()) for place in places]
        assert of_sample == [set((c.ids_keep[c.ids_keep // L == s] % L).tolist()) for s in range(len(places))]
    for name, whole_value, *values in zip(["loss", "parts", *names], expected, *(r[2] for r in runs), strict=True):
        error = (sum(values) / count - whole_value).abs().max()
        assert error <= 1e-10 * whole_value.abs().max().clamp(min=1), name


def test_a_batch_too_small_for_its_share_is_refused():
    objective = Objective(TINY, ObjectiveConfig(no_noise_prob=0.05), NoiseSchedule())
    with pytest.raises(UserError, match=r"int\(16 x 0.05\) = 0 .* batch_size of at least 20, or no_noise_prob 0"):
        objective.corrupt(4, 0, CPU, part=Part(1, 4))
    assert [objective.split(5, Part(i, 4)) for i in range(4)] == [(4, 1), (5, 0), (5, 0), (5, 0)]


def test_each_sample_sees_patches_of_its_own():
    corruption = Objective(TINY, OBJECTIVES["umd"], NoiseSchedule()).corrupt(6, 0, CPU)
    owner = torch.arange(6).repeat_interleave(corruption.layout.patches.cu_seqlens.diff())
    assert torch.equal(corruption.ids_keep // TINY.num_patches, owner)
    assert len(corruption.ids_keep.unique()) == len(corruption.ids_keep) == 3 * 10 + 3 * 4
    assert corruption.num_visible_noised == 30


@pytest.mark.parametrize("config", [TINY, NO_ADALN], ids=["adaLN", "no adaLN"])
def test_shapes_never_change(config):
    """Nothing to plan or compile again: shapes of all draws are equal, and the layout is the same object."""
    objective = Objective(config, OBJECTIVES["umd"], NoiseSchedule())
    first, *others = (objective.corrupt(8, seed, CPU) for seed in range(20))
    for other in others:
        assert other.layout is first.layout
        assert other.ids_keep.shape == first.ids_keep.shape and other.timesteps.shape == first.timesteps.shape
        assert (other.num_noised, other.num_visible_noised) == (first.num_noised, first.num_visible_noised)
    extra = 0 if config.adaLN else 1
    keep = [objective.keep_noised] * 4 + [objective.keep_clean] * 4
    stages = first.layout.patches, first.layout.encoder, first.layout.encoder_blocks
    for stage, more in zip(stages, (0, config.num_cls, config.num_cls + extra), strict=True):
        assert stage.cu_seqlens.diff().tolist() == [more + k for k in keep]
    L = config.num_patches
    assert first.layout.decoder.cu_seqlens.diff().tolist() == [1 + L] * 8
    assert first.layout.decoder_blocks.cu_seqlens.diff().tolist() == [1 + extra + L] * 8


def test_labels_are_for_noised_samples_only():
    objective = Objective(TINY, ObjectiveConfig(class_dropout_prob=0.0), NoiseSchedule())
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    corruption = objective.corrupt(6, 0, CPU, labels)
    of_each = corruption.labels[corruption.layout.patches.cond_index]
    assert of_each.tolist() == [0, 1, 2, 5, 5, 5]  # 5 is the null class
    assert objective.corrupt(6, 0, CPU).labels is None
    for name, expected in (("mae", [5]), ("dit", labels.tolist())):
        config = ObjectiveConfig(**{**vars(OBJECTIVES[name]), "class_dropout_prob": 0.0})
        assert Objective(TINY, config, NoiseSchedule()).corrupt(6, 0, CPU, labels).labels.tolist() == expected


def test_share_of_dropped_labels():
    objective = Objective(TINY, ObjectiveConfig(no_noise_prob=0.0), NoiseSchedule())
    labels = torch.arange(50) % 5
    drawn = torch.stack([objective.corrupt(50, seed, CPU, labels).labels for seed in range(100)])
    dropped = drawn == 5
    assert (drawn == labels)[~dropped].all()
    assert binomtest(int(dropped.sum()), dropped.numel(), 0.1).pvalue > 0.001
    always = Objective(TINY, ObjectiveConfig(class_dropout_prob=1.0), NoiseSchedule())
    assert (always.corrupt(50, 0, CPU, labels).labels == 5).all()


def test_a_step_is_a_function_of_its_seed():
    """Same seed, same bits; another seed, other draws; the global generators are neither read nor moved."""
    model, x_start = randomised(TINY, torch.float32), images(TINY, 6, torch.float32)
    objective = Objective(TINY, OBJECTIVES["umd"], NoiseSchedule())

    def step(seed):
        corruption = objective.corrupt(6, seed, CPU, torch.arange(6) % 5)
        loss, parts = objective(model, x_start, corruption)
        return corruption, [loss, parts, *torch.autograd.grad(loss, list(model.parameters()))]

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, results = step(5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again, same = step(5)
    assert all(torch.equal(a, b) for a, b in zip(results, same, strict=True))
    for name in ("ids_keep", "timesteps", "labels", "noise"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    other, different = step(6)
    for name in ("ids_keep", "timesteps", "noise"):
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert different[0] != results[0]


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_visible_patches(name, schedule):
    """The encoder sees rows of patchify(q_sample), and of the image itself where there is no noise."""
    schedule = NoiseSchedule(schedule)
    objective = Objective(TINY, OBJECTIVES[name], schedule)
    x_start = images(TINY, 6)
    corruption = objective.corrupt(6, 1, CPU)
    n = corruption.num_noised
    eps = philox_randn_samples(corruption.noise, x_start.shape[1:], dtype=torch.float64)
    x_t = torch.cat([schedule.q_sample(x_start[:n], corruption.timesteps[:n], eps), x_start[n:]])
    rows = patchify(x_t, 2).flatten(0, 1)[corruption.ids_keep]
    torch.testing.assert_close(objective.visible_patches(x_start, corruption), rows, rtol=1e-12, atol=1e-12)


def test_masks_that_leave_nothing_are_refused():
    schedule = NoiseSchedule()
    for changes, words in (
        (dict(mask_ratio=0.99), "leaves no patch of 16 visible"),
        (dict(mask_ratio_no_noise=0.95), "leaves no patch of 16 visible"),
        (dict(mask_ratio=1e-20), "hides none of 16 patches"),
        (dict(mask_ratio_no_noise=0.0), "nothing to predict"),
        (dict(mask_ratio=1.0), "mask_ratio 1: must be at least 0 and below 1"),
        (dict(mask_ratio_no_noise=-0.1), "mask_ratio_no_noise -0.1: must be at least 0 and below 1"),
    ):
        with pytest.raises(UserError, match=words):
            Objective(TINY, ObjectiveConfig(**changes), schedule)
    for changes in (dict(no_noise_prob=1.5), dict(class_dropout_prob=-0.1)):
        with pytest.raises(UserError, match="must be at least 0 and at most 1"):
            ObjectiveConfig(**changes)
    # No noise-free sample is trained here, so nothing is missing.
    Objective(TINY, ObjectiveConfig(no_noise_prob=0.0, mask_ratio_no_noise=0.0), schedule)


class Repeated(TorchDispatchMode):
    """The ops that add rows to places that repeat. On a GPU they use atomics: the order, and so the sum, varies."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("index_add", "index_add_", "scatter_add", "scatter_add_"):
            places = args[2]
            self.found += [name] * (len(places.unique()) < len(places))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, dict(decoder="cross"), dict(adaLN=False), dict(adaLN=False, decoder="cross")])
def test_the_backward_pass_adds_in_one_order(changes):
    """Without adaLN all noise-free samples share one condition row, whose gradient is a sum over all of them."""
    config = replace(TINY, num_classes=0, **changes)
    objective = Objective(config, ObjectiveConfig(no_noise_prob=0.5), NoiseSchedule())
    loss, _ = objective(randomised(config), images(config, 8), objective.corrupt(8, 0, CPU))
    with Repeated() as repeated:
        loss.backward()
    assert not repeated.found


def test_a_layout_kept_serves_whoever_comes_next():
    """Validation before training, and a mode of tensors without data before and behind real ones."""
    for keep, modes in (((3, 5), (torch.inference_mode, nullcontext)), ((4, 5), (FakeTensorMode, nullcontext))):
        kept = []
        for mode in (*modes, *modes):
            with mode():
                made = layout(TINY, keep, None, CPU).encoder
            assert isinstance(made.chunks, FakeTensor) == (mode is FakeTensorMode)
            if mode is not FakeTensorMode:
                assert not made.chunks.is_inference() and made.cu_seqlens.tolist() == [0, 1 + keep[0], 2 + sum(keep)]
                kept.append(made.chunks)
        assert all(chunks is kept[0] for chunks in kept)
