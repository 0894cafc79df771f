"""Reading traces of torch.profiler: a hand-made one with known sums, and real ones of small networks."""

import gzip
import json
from collections import Counter

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.checkpoint import checkpoint

from umd.config import ModelConfig, ObjectiveConfig
from umd.errors import UserError
from umd.model import UMD
from umd.objective import Objective
from umd.schedule import NoiseSchedule
from umd.spans import span, spans_on
from umd.train.trace import NO_OP, read_trace, readable


def event(cat, name, ts, dur, tid=1, **args) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


def written(path, events):
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def recorded(path, step, steps=2):
    """The trace of `step()`, called so many times with spans on."""
    with (
        spans_on(),
        profile(
            activities=[ProfilerActivity.CPU], schedule=schedule(wait=0, warmup=1, active=steps, repeat=1)
        ) as profiler,
    ):
        for _ in range(1 + steps):
            step()
            profiler.step()
    profiler.export_chrome_trace(str(path))
    return read_trace(path)


# A GPU's trace: two steps of 1 ms, the GPU 0.3 ms behind the host

GPU = [
    event("user_annotation", "ProfilerStep#5", 1000, 1000),
    event("user_annotation", "encoder", 1100, 300),
    event("cpu_op", "aten::linear", 1110, 100),
    event("cpu_op", "aten::addmm", 1120, 80),
    event("cuda_runtime", "cudaLaunchKernel", 1150, 10, correlation=11),
    event("cuda_driver", "cuLaunchKernelEx", 1300, 20, correlation=12),
    # The backward pass has a thread of its own.
    {"ph": "s", "cat": "fwdbwd", "id": 3, "pid": 1, "tid": 1, "ts": 1120},
    {"ph": "f", "cat": "fwdbwd", "id": 3, "pid": 1, "tid": 2, "ts": 1520, "bp": "e"},
    event("cpu_op", "autograd::engine::evaluate_function: AddmmBackward0", 1510, 100, tid=2),
    event("cpu_op", "AddmmBackward0", 1520, 80, tid=2),
    event("cpu_op", "aten::mm", 1530, 60, tid=2),
    event("cuda_runtime", "cudaLaunchKernel", 1540, 10, tid=2, correlation=13),
    event("cuda_runtime", "cudaDeviceSynchronize", 1700, 200, correlation=14),
    event("user_annotation", "ProfilerStep#6", 2000, 1000),
    event("cuda_runtime", "cudaMemcpyAsync", 2100, 50, correlation=15),
    # Launched before the first step, then what the steps launched; the last one while the host is done.
    event("kernel", "warm_up", 1010, 90, tid=7, device=0, stream=7, correlation=9),
    event("kernel", "gemm", 1400, 100, tid=7, device=0, stream=7, correlation=11),
    event("kernel", "_layer_norm_fwd_kernel", 1550, 50, tid=7, device=0, stream=7, correlation=12),
    event("kernel", "gemm", 1590, 200, tid=7, device=0, stream=7, correlation=13),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 3100, 40, tid=9, device=0, stream=9, correlation=15),
    event("gpu_user_annotation", "encoder", 1400, 390, tid=7),
]


def test_kernels_of_a_gpu_belong_to_the_part_that_launched_them(tmp_path):
    trace = read_trace(written(tmp_path / "trace.json", GPU))
    assert [(w.name, w.op, w.part, w.backward, w.ms) for w in trace.work] == [
        ("gemm", "aten::addmm", "encoder", False, 0.1),
        ("_layer_norm_fwd_kernel", "", "encoder", False, 0.05),
        ("gemm", "aten::mm", "encoder", True, 0.2),
        ("Memcpy HtoD (Pinned -> Device)", "", "", False, 0.04),
    ]
    assert trace.on_gpu and trace.steps == 2
    assert trace.step_ms == 1.0
    assert trace.idle_ms == pytest.approx(0.05)  # 1500 to 1550 on stream 7; the next two overlap
    assert trace.launch_ms == pytest.approx(0.04)  # 10 + 20 + 10; copies and waiting are no launches


def test_a_trace_without_marked_steps_counts_whole(tmp_path):
    trace = read_trace(written(tmp_path / "trace.json", [e for e in GPU if "ProfilerStep" not in e.get("name", "")]))
    assert trace.steps == 0 and trace.step_ms is None
    assert sum(w.ms for w in trace.work) == pytest.approx(0.09 + 0.1 + 0.05 + 0.2 + 0.04)


def test_compressed_or_in_the_folder_of_a_run_or_a_bare_list_it_is_the_same_trace(tmp_path):
    expected = read_trace(written(tmp_path / "trace.json", GPU)).work
    (tmp_path / "run" / "profile").mkdir(parents=True)
    (tmp_path / "run" / "profile" / "trace.json.gz").write_bytes(gzip.compress(json.dumps(GPU).encode(), mtime=0))
    assert read_trace(tmp_path / "run").work == expected


# A CPU's


def test_own_times_of_a_cpu_fill_the_step(tmp_path):
    """An op's own time is without the ops inside it; what lies in no op is Python's."""
    trace = read_trace(
        written(
            tmp_path / "trace.json",
            [
                event("user_annotation", "ProfilerStep#0", 0, 100),
                event("user_annotation", "loss", 10, 60),
                event("cpu_op", "aten::mean", 20, 40),
                event("cpu_op", "aten::sum", 25, 30),
                event("cpu_op", "aten::div_", 80, 5),
                event("cpu_op", "aten::add", 101, 50),  # after the step
            ],
        )
    )
    times = Counter()
    for work in trace.work:
        times[work.name, work.part] += work.ms
    assert times == pytest.approx(
        {
            ("aten::mean", "loss"): 0.010,
            ("aten::sum", "loss"): 0.030,
            (NO_OP, "loss"): 0.020,
            ("aten::div_", ""): 0.005,
            (NO_OP, ""): 0.035,
        }
    )
    assert not trace.on_gpu and sum(times.values()) == pytest.approx(trace.step_ms)


def test_the_backward_pass_belongs_to_the_parts_whose_gradient_it_makes(tmp_path):
    """A linear layer's gradients are two products, of the first layer one: its input needs none."""
    encoder, decoder = nn.Linear(8, 16), nn.Linear(16, 4)
    x = torch.randn(32, 8)

    def step():
        with span("encoder"):
            y = encoder(x)
        with span("decoder"):
            y = decoder(y)
        with span("loss"):
            loss = y.square().mean()
        with span("backward"):
            loss.backward()

    trace = recorded(tmp_path / "trace.json", step)
    calls = Counter((w.name, w.part, w.backward) for w in trace.work)
    products = {key: count for key, count in calls.items() if key[0] in ("aten::addmm", "aten::mm")}
    assert products == {
        ("aten::addmm", "encoder", False): 2,
        ("aten::addmm", "decoder", False): 2,
        ("aten::mm", "encoder", True): 2,
        ("aten::mm", "decoder", True): 4,
    }
    assert calls["torch::autograd::AccumulateGrad", "backward", False] == 2 * 4
    assert trace.steps == 2 and sum(w.ms for w in trace.work) == pytest.approx(2 * trace.step_ms, rel=1e-3)


def test_what_checkpointing_computes_again_is_backward(tmp_path):
    layer = nn.Linear(8, 8)
    x = torch.randn(32, 8, requires_grad=True)

    def step():
        with span("encoder"):
            y = checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=False)
        y.sum().backward()

    calls = Counter((w.name, w.part, w.backward) for w in recorded(tmp_path / "trace.json", step).work)
    assert calls["aten::addmm", "encoder", False] == calls["aten::addmm", "encoder", True] == 2


def test_the_network_names_its_parts(tmp_path):
    model = ModelConfig(image_size=(8, 8), patch_size=2, hidden_size=32, depth=1, decoder_depth=1, num_heads=2)
    network, objective = UMD(model), Objective(model, ObjectiveConfig(), NoiseSchedule("cosine"))
    for parameter in network.adaLN_modulation.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 3, 8, 8)

    def step():
        objective(network, x, objective.corrupt(4, 0, x.device))[0].backward()

    parts = {(w.part, w.backward) for w in recorded(tmp_path / "trace.json", step, steps=1).work}
    assert parts >= {(part, way) for part in ("adaLN", "encoder", "decoder", "head") for way in (False, True)}


# What is wrong


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no trace can be read at"),
        (b"", "is not JSON or was cut short"),
        (b'{"traceEvents": [', "is not JSON or was cut short"),
        (b"\xff\xfe\x00", "is not JSON or was cut short"),
        (gzip.compress(b'{"traceEvents": []}' * 99, mtime=0)[:40], "is not JSON or was cut short"),
        (gzip.compress(b"{}", mtime=0)[:-8] + 8 * b"x", "is damaged"),
        (b"3", "has no traceEvents"),
        (b'{"events": []}', "has no traceEvents"),
        (b"[1, 2]", "has no traceEvents"),
        (b'{"traceEvents": []}', "holds no ops and no kernels"),
        (b'[{"ph": "X", "cat": "cpu_op", "ts": 1, "dur": 1}]', "is not a trace of torch.profiler .*name"),
        (b'[{"ph": "X", "cat": "kernel", "name": "k", "ts": "a", "dur": 1}]', "is not a trace of torch.profiler"),
        (b'[{"ph": "X", "cat": "kernel", "name": "k", "ts": 1, "dur": 1, "args": 3}]', "is not a trace of torch"),
    ],
)
def test_what_is_no_trace_is_said_in_a_sentence(tmp_path, content, said):
    if content is not None:
        (tmp_path / "trace.json").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_trace(tmp_path / "trace.json")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_profile(tmp_path):
    with pytest.raises(UserError, match="profile/trace.json.gz.*--profile"):
        read_trace(tmp_path)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("_layer_norm_fwd_kernel", "_layer_norm_fwd_kernel"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD (Pinned -> Device)"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTT", "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTT"),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::CUDAFunctor_add"
            "<float> >(at::TensorIteratorBase&, at::native::CUDAFunctor_add<float> const&)::{lambda(int)#1}>(int)",
            "elementwise_kernel<128, 4, gpu_kernel_impl_nocast<CUDAFunctor_add<float>>>",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&, "
            "at::native::GeluType)::{lambda()#1}::operator()() const::{lambda(float)#1}, std::array<char*, 2ul> >(int)",
            "vectorized_elementwise_kernel<4, GeluCUDAKernelImpl, array<char*, 2ul>>",
        ),
    ],
)
def test_names_of_kernels_can_be_read(name, shown):
    assert readable(name) == shown
