"""GPT-2 is the reference implementation's, to the last digits; its kernels compute the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, gpt2_config
from torch.utils._python_dispatch import TorchDispatchMode

from picogpt import models
from picogpt.config import GPT2Config
from picogpt.data.fetch import pretrained
from picogpt.models import kernels
from picogpt.models.gpt2 import GPT2
from picogpt.models.kernels import linear_cross_entropy
from picogpt.models.pretrained import TRANSPOSED, VOCAB_SIZE
from picogpt.sample import Decoding, generate

transformers = pytest.importorskip("transformers")
V = 997


def pair(config: GPT2Config) -> tuple[GPT2, torch.nn.Module]:
    """Ours and theirs with the same weights; biases and gains are disturbed, so that a forgotten one shows."""
    ours = models.build(config, V, seed=0)
    torch.manual_seed(1)
    for parameter in ours.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    c, no_dropout = config, dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0)
    shape = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_positions": c.block_size}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, **shape, **no_dropout))
    state = {f"transformer.{n}": t.T if n.endswith(TRANSPOSED) else t for n, t in ours.state_dict().items()}
    missing = theirs.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]  # tied
    assert not missing.unexpected_keys
    return ours, theirs


@pytest.mark.parametrize("name", pretrained())
def test_logits_loss_and_gradients_equal_the_reference_at_every_size(name: str):
    ours, theirs = pair(pretrained()[name].config().model_copy(update={"n_layer": 1}))
    for length in (1, 7, 130):
        idx = torch.randint(V, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            assert (ours(idx) - theirs(idx).logits).abs().max() < 1e-4
    targets = idx.roll(-1, 1)
    loss = ours(idx, targets)
    expected = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    expected.backward()
    theirs_by_name = {n.removeprefix("transformer."): p.grad for n, p in theirs.named_parameters()}
    for n, parameter in ours.named_parameters():
        expected_grad = theirs_by_name[n].T if n.endswith(TRANSPOSED) else theirs_by_name[n]
        assert (parameter.grad - expected_grad).abs().max() < 1e-5, n


def test_the_full_context_equals_the_reference():
    ours, theirs = pair(GPT2Config(kind="gpt2", n_layer=2, n_head=4, n_embd=64))
    idx = torch.randint(V, (1, 1024))
    with torch.no_grad():
        assert (ours(idx) - theirs(idx).logits).abs().max() < 1e-4


def test_every_size_has_the_parameters_it_is_called_by_and_the_stated_cost():
    costs = []
    for asset in pretrained().values():
        with torch.device("meta"):
            model = GPT2(asset.config(), VOCAB_SIZE)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == int(asset.parameters.removesuffix("M"))
        costs.append(round(model.flops_per_token() / 1e6))
    assert costs[0] == 854


def test_initial_weights_are_gpt2s():
    state = models.build(gpt2_config(n_layer=8, n_embd=256, n_head=4), 4000, seed=0).state_dict()
    for name, std in (("wte", 0.02), ("h.3.mlp.c_fc", 0.02), ("h.3.mlp.c_proj", 0.02 / 4)):
        assert state[f"{name}.weight"].std().item() == pytest.approx(std, rel=0.02)
    assert not state["h.3.mlp.c_fc.bias"].any()
    assert (state["ln_f.weight"] == 1).all()
    assert "head.weight" not in state


def test_the_model_alone_and_with_all_kernels_gives_the_same():
    config, idx = gpt2_config(n_layer=2, block_size=40), torch.arange(80).view(2, 40) % 70
    model = models.build(config, 70, seed=1)
    alone = GPT2(config, 70)
    alone.load_state_dict(model.state_dict())
    assert torch.allclose(alone(idx), model(idx), atol=1e-6)
    for attention in kernels.ATTENTION:
        for loss in kernels.LOSSES:
            kernels.use(model, attention, loss)
            assert model(idx, idx).item() == pytest.approx(alone(idx, idx).item(), abs=1e-5)


@pytest.mark.parametrize("layer", [kernels.Int8Linear, kernels.PackedLinear, kernels.Bfloat16Linear])
def test_a_specialized_model_is_evaluated_with_its_own_output_layer(layer):
    model, idx = models.build(gpt2_config(), 70, seed=1), torch.arange(16)[None]
    if layer is kernels.PackedLinear and not kernels.can_pack(torch.float32):
        pytest.skip("this torch cannot pack weights")
    model = kernels.specialize(model if layer is kernels.PackedLinear else model.bfloat16(), layer).eval()
    with torch.no_grad():
        expected = F.cross_entropy(model(idx)[0].float(), idx[0])
        assert model(idx, idx).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("vocab_size", [64, 65, 127])
@pytest.mark.parametrize("budget", [1 << 28, 1 << 12])
def test_the_fused_loss_is_cross_entropy_whatever_is_held_at_once(monkeypatch, vocab_size: int, budget: int):
    monkeypatch.setattr(kernels, "LOGITS_BYTES", budget)  # 4 KiB: several parts
    torch.manual_seed(0)
    x, weight = torch.randn(150, 16, requires_grad=True), torch.randn(vocab_size, 16, requires_grad=True)
    targets = torch.randint(vocab_size, (150,))
    expected = F.cross_entropy(x @ weight.T, targets)
    gradients = torch.autograd.grad(3 * expected, (x, weight))
    loss = linear_cross_entropy(x, weight, targets)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for ours, theirs in zip(torch.autograd.grad(3 * loss, (x, weight)), gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, targets).item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_kernel_of_a_gpu_computes_the_same_loss_and_gradient():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    script = [sys.executable, "-W", "ignore", str(ROOT / "tests/interpreted.py")]
    run = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert run.stdout == "equal\n", run.stderr


def test_the_residual_stream_can_be_bfloat16():
    """Loss and gradients are those of float32, to the rounding of bfloat16; every addition to the stream is in bfloat16."""
    idx = torch.arange(32).view(2, 16) % 70
    model, streams = models.build(gpt2_config(n_layer=2), 70, seed=1), []
    for block in model.h:
        block.register_forward_hook(lambda module, inputs, output: streams.append(output.dtype))
    results = []
    for residual in ("float32", "bfloat16", "float32"):
        kernels.use(model, residual=residual)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(idx, idx.roll(1))
        results.append((loss.item(), *torch.autograd.grad(loss, list(model.parameters()))))
    assert streams == [torch.float32] * 2 + [torch.bfloat16] * 2 + [torch.float32] * 2
    (loss, *gradients), (rounded, *rounded_gradients), (again, *_) = results
    assert again == loss
    assert rounded == pytest.approx(loss, abs=5e-3)
    for ours, exact in zip(rounded_gradients, gradients, strict=True):
        assert F.cosine_similarity(ours.flatten(), exact.flatten(), dim=0) > 0.99


def test_columns_of_padding_take_no_part_in_the_loss():
    # All real logits are far below zero: a padded column, which is zero, would take all the probability.
    x, weight = torch.ones(4, 8), torch.full((65, 8), -10.0)
    assert linear_cross_entropy(x, weight, torch.arange(4)).item() == pytest.approx(torch.tensor(65.0).log().item())


def test_the_logits_of_the_whole_batch_are_never_held(monkeypatch):
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            made = function(*arguments, **(named or {}))
            tensors = [part for part in (made if isinstance(made, tuple | list) else [made]) if torch.is_tensor(part)]
            sizes.extend(tensor.numel() for tensor in tensors)
            return made

    N, V, C = 512, 1024, 8
    monkeypatch.setattr(kernels, "LOGITS_BYTES", 64 * V * 4)
    x, weight = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    with Watch():
        linear_cross_entropy(x, weight, torch.randint(V, (N,))).backward()
    assert 32 * V <= max(sizes) <= 64 * V


def test_attention_in_blocks_in_bfloat16_is_as_exact_as_attention_written_out():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 200, 16) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = kernels.fastest_attention(*(x.bfloat16().requires_grad_() for x in (q, k, v)))
    assert y.grad_fn.name() == "BlockedAttentionBackward"
    assert (y.float() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
def test_attention_in_blocks_is_attention(length: int):
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for _ in range(3))
    g = torch.randn(2, 3, length, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    gradients = torch.autograd.grad(expected, (q, k, v), g)
    y = kernels.BlockedAttention.apply(q, k, v)
    assert torch.allclose(y, expected, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(y, (q, k, v), g), gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_dropout_drops_in_training_alone():
    model, idx = models.build(gpt2_config(dropout=0.5), 11, seed=0), torch.arange(8)[None]
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_an_id_beyond_the_vocabulary_is_an_error():
    with pytest.raises(IndexError):
        models.build(gpt2_config(), 11, seed=0)(torch.tensor([[11]]))


def test_the_file_can_be_read_in_a_sitting():
    assert len(Path(models.__file__).with_name("gpt2.py").read_text().splitlines()) < 200


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_on_a_gpu_logits_loss_and_gradients_are_those_of_the_cpu():
    config = gpt2_config(n_layer=2, n_head=4, n_embd=64, block_size=128)
    ours, there = models.build(config, V, seed=0), models.build(config, V, seed=0).cuda()
    idx = torch.randint(V, (2, 128))
    loss, loss_there = ours(idx, idx), there(idx.cuda(), idx.cuda())
    assert loss_there.item() == pytest.approx(loss.item(), abs=1e-4)
    loss.backward()
    loss_there.backward()
    for (name, parameter), other in zip(ours.named_parameters(), there.parameters(), strict=True):
        assert (parameter.grad - other.grad.cpu()).abs().max() < 1e-3, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@pytest.mark.parametrize("lengths", [(5,), (5, 60, 9)])
def test_on_a_gpu_a_graph_gives_the_tokens_of_the_model_without_a_cache(lengths: tuple[int, ...]):
    model = models.build(gpt2_config(n_layer=2, n_head=4, n_embd=64, block_size=64), V, seed=0).cuda().eval()
    prompts = [torch.randint(V, (length,), device="cuda") for length in lengths]
    graph = generate(model, prompts, 150, Decoding(top_k=20), seed=3)
    assert torch.equal(graph, generate(model, prompts, 150, Decoding(top_k=20), seed=3, cached=False))
