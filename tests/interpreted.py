"""The Triton kernel of the fused loss against its reference and float64, run by Triton's interpreter: a process of its own,
because Triton reads TRITON_INTERPRET when it is imported."""

import torch
import torch.nn.functional as F

from picogpt.models import kernels, triton_loss

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for vocab_size, columns in ((501, 512), (4096, 4096), (5000, 5056)):
        logits = (4 * torch.randn(6, columns)).to(dtype)
        targets = torch.randint(vocab_size, (6,)).index_fill_(0, torch.tensor([0]), vocab_size - 1)
        ours, reference = logits.clone(), logits.clone()
        losses, expected = torch.empty(6), torch.empty(6)
        triton_loss.softmax_loss(ours, vocab_size, targets, losses, 1 / 6)
        kernels.softmax_loss(reference, vocab_size, targets, expected, 1 / 6)
        assert torch.allclose(losses, expected, atol=1e-5)
        exact = logits[:, :vocab_size].double().softmax(-1)
        exact = (exact - F.one_hot(targets, vocab_size)) / 6
        assert torch.allclose(ours[:, :vocab_size].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)
        assert not ours[:, vocab_size:].any()
print("equal")
