"""Our own attention for short samples, forward, backward and bias gradient, against the definition in fp64."""

import pytest
import torch
from torch.library import opcheck

from umd.kernels.attention import attention_backend, varlen_attention, varlen_attention_ref
from umd.kernels.packing import pack
from umd.kernels.triton import attention as kernels
from umd.kernels.triton.attention import short_attention_bwd, short_attention_fwd

# Token 0 alone, one tile and a token, tiles that are full to the last place and one beyond, samples of nothing.
LENGTHS = [[1], [2, 65, 1], [65, 0, 64, 66], [161, 65, 17], [257], [0]]


@pytest.fixture
def kernel_device(device, request):
    if request.node.callspec.params["device"] == "torch":
        pytest.skip("there is no definition to choose here")
    return device


def draw(lengths, H=2, d=64, device="cpu", spread=1.0):
    """fp16 in the interpreter, whose product knows no bf16."""
    packing = pack(lengths, device=device)
    generator = torch.Generator().manual_seed(len(lengths))
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    qkv, dout = (torch.randn(packing.num_tokens, *s, H, d, generator=generator) for s in ((3,), ()))
    return packing, (spread * qkv).to(device, dtype), dout.to(device, dtype)


def gradients(op, qkv, dout, bias=None):
    leaves = [x.detach().requires_grad_() for x in (qkv, bias) if x is not None]
    out = op(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype), materialize_grads=True)]


def ours(packing):
    return lambda qkv, bias=None: varlen_attention(qkv, packing, "triton", bias)


def exact(packing, qkv, dout):
    out, dqkv = gradients(lambda x: varlen_attention_ref(x, packing), qkv.double(), dout)
    return out, dqkv, dqkv.sum(0).flatten()


def relative(found, truth):
    return float((found.double() - truth).norm() / truth.norm().clamp(min=1e-30))


@pytest.mark.parametrize("H, d", [(2, 64), (1, 32), (3, 16)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_is_the_definition(kernel_device, lengths, H, d):
    packing, qkv, dout = draw(lengths, H, d, kernel_device)
    bias = torch.zeros(3 * H * d, device=kernel_device)  # in qkv already: its values are of no importance
    found = gradients(ours(packing), qkv, dout, bias)
    truth = exact(packing, qkv, dout)
    plain = gradients(lambda x: varlen_attention_ref(x, packing), qkv, dout)
    eps = torch.finfo(qkv.dtype).eps
    for a, b, same in zip(found, truth, [*plain, None], strict=True):
        assert a.shape == b.shape and a.isfinite().all()
        assert relative(a, b) <= (2 * eps if same is None else 2 * relative(same, b) + eps)
    assert found[2].dtype == torch.float32 and found[1].dtype == qkv.dtype


def test_scores_far_apart(kernel_device):
    """Softmax of scores in the hundreds: exponents that overflow unless each row's largest is taken off."""
    packing, qkv, dout = draw([70, 65, 3], device=kernel_device, spread=8.0)
    found, truth = gradients(ours(packing), qkv, dout), exact(packing, qkv, dout)
    assert relative(found[0], truth[0]) < 0.01 and relative(found[1], truth[1]) < 0.02


def test_a_bias_of_keys_has_no_gradient(kernel_device):
    """What is added to all keys adds the same to all scores of a query, and softmax does not see it."""
    packing, qkv, dout = draw([65, 30], device=kernel_device)
    _, dqkv, dbias = exact(packing, qkv, dout)
    q, k, v = dbias.view(3, -1).norm(dim=1).tolist()
    assert k < 1e-12 * min(q, v)
    found = gradients(ours(packing), qkv, dout, torch.zeros(3 * 2 * 64, device=kernel_device))[2]
    assert (found.view(3, -1)[1] == 0).all()


def test_without_a_bias_the_gradients_are_the_same(kernel_device):
    packing, qkv, dout = draw([65, 30], device=kernel_device)
    bias = torch.zeros(3 * 2 * 64, device=kernel_device)
    with_bias, without = gradients(ours(packing), qkv, dout, bias), gradients(ours(packing), qkv, dout)
    assert torch.equal(with_bias[0], without[0]) and torch.equal(with_bias[1], without[1])


def test_comparison_notices_a_wrong_boundary(kernel_device):
    packing, qkv, dout = draw([65, 30], device=kernel_device)
    wrong = packing._replace(cu_seqlens=packing.cu_seqlens + torch.tensor([0, 1, 0], device=kernel_device).int())
    found, truth = gradients(ours(wrong), qkv, dout), exact(packing, qkv, dout)
    assert not relative(found[0], truth[0]) < 0.01 and not relative(found[1], truth[1]) < 0.01


def test_comparison_notices_a_lost_token_0(kernel_device, monkeypatch):
    """A scale that only the tiles get: token 0 counts with another weight."""
    packing, qkv, dout = draw([65, 30], device=kernel_device)
    truth = exact(packing, qkv, dout)
    monkeypatch.setattr(kernels, "LOG2E", 1.0)
    found = gradients(ours(packing), qkv, dout)
    assert not relative(found[0], truth[0]) < 0.01 and not relative(found[1], truth[1]) < 0.01


def test_opcheck(kernel_device):
    packing, qkv, dout = draw([17, 5], H=1, d=16, device=kernel_device)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    opcheck(short_attention_fwd.library, (qkv.requires_grad_(), packing.cu_seqlens, 17), test_utils=tests)
    out, lse = (x.detach() for x in short_attention_fwd(qkv, packing.cu_seqlens, 17))
    arguments = dout, qkv.detach(), out, lse, packing.cu_seqlens, 17
    opcheck(short_attention_bwd.library, arguments, test_utils=tests[:2])


def test_what_it_refuses():
    packing, qkv, _ = draw([5], H=2, d=24)
    with pytest.raises(ValueError, match="triton takes head dimensions 16, 32 and 64, not 24"):
        varlen_attention(qkv, packing, "triton")
    with pytest.raises(ValueError, match="triton takes bf16 and fp16, not float32"):
        varlen_attention(draw([5])[1].float(), packing, "triton")
    with pytest.raises(ValueError, match="triton takes self-attention alone"):
        attention_backend(torch.device("cuda"), torch.bfloat16, 64, packing, "triton", packing)
