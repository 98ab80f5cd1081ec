"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830): which of four endings a model finds the most likely one.

Scored as in karpathy/build-nanogpt: the tokens of the context, then those of a space and the ending. `acc` counts the
items where the right ending has the highest log-probability, `acc_norm` those where it has the highest mean per token.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch.nn.utils.rnn import pad_sequence

from picogpt import hardware, records
from picogpt.config import Settings, parse
from picogpt.data.tokenizers import Tokenizer
from picogpt.errors import PicogptError, UsageError
from picogpt.files import sha256_file
from picogpt.models.cache import KVCache
from picogpt.models.gpt2 import GPT2
from picogpt.models.language_model import LanguageModel
from picogpt.progress import Scoring
from picogpt.sample import prepare

TOKENS_PER_PASS = {"cpu": 1 << 11, "cuda": 1 << 15}
LOGITS_AT_ONCE = 512
"""Rows of 50,257 numbers that are in memory together."""
Text = Annotated[str, Field(min_length=1)]


class Line(Settings, extra="ignore"):
    """A line of the file; its other keys do not matter here."""

    ctx: Text
    endings: list[Text] = Field(min_length=4, max_length=4)
    label: int = Field(ge=0, le=3)


class Item(NamedTuple):
    """Token ids of a context and of its four endings; `label` is the number of the right one."""

    context: list[int]
    endings: list[list[int]]
    label: int


def read(path: Path, tokenizer: Tokenizer, limit: int | None = None) -> list[Item]:
    """The items of a file, or the first `limit` of them.

    Raises PicogptError naming the line that is not JSON, and UsageError naming the one that is no item.
    """
    lines = [
        parse(Line, row, f"{path}, line {number}") for number, row in enumerate(records.read_lines(path)[:limit], 1)
    ]
    if not lines:
        raise PicogptError(f"{path} holds no items")

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text).tolist()

    return [Item(ids(line.ctx), [ids(f" {ending}") for ending in line.endings], line.label) for line in lines]


class _Packed(KVCache):
    """In place of a cache: each row is a context and then its four endings, each of which sees the context and itself.

    So a context is computed once. `branch` (B, T) is the number of the ending that a token belongs to, from 1, and 0 for
    the context and for padding; `before` (B, T) is where the token stands from which a token is predicted.
    """

    def __init__(self, items: Sequence[Item], device: torch.device):
        rows, positions, branches, before = [], [], [], []
        for context, endings, _ in items:
            start = len(context)
            rows.append([*context, *itertools.chain(*endings)])
            positions.append([*range(start), *(start + n for ending in endings for n in range(len(ending)))])
            branches.append([0] * start + [branch for branch, ending in enumerate(endings, 1) for _ in ending])
            # For the first token of an ending that is the last one of the context.
            before.append([start - 1 if n == start else at - 1 for at, n in enumerate(positions[-1])])
        self.idx, self.positions, self.branch, self.before = (
            pad_sequence([torch.tensor(row) for row in table], batch_first=True).to(device)
            for table in (rows, positions, branches, before)
        )
        order, branch = torch.arange(self.idx.size(1), device=device), self.branch[:, None]  # (T,), (B, 1, T)
        seen = (order <= order[:, None]) & ((branch == branch.mT) | (branch == 0))
        self.mask = seen[:, None]  # (B, 1, T, T)

    def start(self, count: int) -> torch.Tensor:
        return self.positions

    def attention(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=self.mask)


@torch.inference_mode()
def log_likelihoods(
    model: GPT2, items: Sequence[Item], advance: Callable[[int, int], object] = lambda items, tokens: None
) -> torch.Tensor:
    """Log-probability, in nats, of each ending after its context: float64 (N, 4), summed over the tokens of the ending.

    `advance` is called with the numbers of items and tokens that were scored.
    """
    lengths = [len(item.context) + sum(map(len, item.endings)) for item in items]
    device, found = model.ln_f.weight.device, torch.zeros(len(items), 4, dtype=torch.float64)
    for batch in _batches(lengths, TOKENS_PER_PASS.get(device.type, TOKENS_PER_PASS["cpu"])):
        packed = _Packed([items[index] for index in batch], device)
        row, column = packed.branch.nonzero(as_tuple=True)  # of the tokens of endings, (N,) each
        states = model.hidden(packed.idx, packed)[row, packed.before[row, column]]  # (N, C)
        parts = zip(states.split(LOGITS_AT_ONCE), packed.idx[row, column].split(LOGITS_AT_ONCE), strict=True)
        losses = [F.cross_entropy(model.head(x).float(), tokens, reduction="none") for x, tokens in parts]
        sums = torch.zeros(len(batch), 5, dtype=torch.float64)  # on the CPU, where they are added in order
        where = row.cpu(), packed.branch[row, column].cpu()
        found[batch] = sums.index_put_(where, -torch.cat(losses).cpu().double(), accumulate=True)[:, 1:]
        advance(len(batch), sum(lengths[index] for index in batch))
    return found


def _batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indexes of rows of similar lengths, at most `most` tokens with their padding, or one row."""
    order, batches = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True), []
    while order:
        count = max(1, most // lengths[order[0]])
        batches.append(order[:count])
        order = order[count:]
    random.Random(0).shuffle(batches)  # so that the time left is that of short and long ones
    return batches


def _fitting(item: Item, block_size: int, source: str) -> Item:
    """The item with as much of the end of its context as fits before its longest ending."""
    longest = max(map(len, item.endings))
    if longest >= block_size:
        raise UsageError(f"{source} has a context of {block_size} tokens: too short for an ending of {longest}")
    return item._replace(context=item.context[-(block_size - longest) :])


def accuracy(
    key: records.Key,
    model: LanguageModel,
    tokenizer: Tokenizer,
    source: str,
    path: Path,
    *,
    device: str,
    dtype: str,
    limit: int | None = None,
) -> dict[str, Any]:
    """The record of how often a GPT-2 finds the right ending, over all items of the file or its first `limit`.

    Raises as `read`; UsageError for another model, or one with too short a context; PicogptError where it computes NaN.
    """
    if not isinstance(model, GPT2):
        raise UsageError(f"{source} is not a GPT-2, the only model that --task hellaswag knows")
    where = hardware.select(device, "float32")  # no autocast: the weights have the dtype that is measured
    record = {**records.provenance(where), **key._asdict()}
    block_size, whole = model.config.block_size, read(path, tokenizer, limit)
    items = [_fitting(item, block_size, source) for item in whole]
    model = prepare(model, device, dtype, decoding=False)
    assert isinstance(model, GPT2)
    with Scoring("HellaSwag", len(items)) as progress:
        sums = log_likelihoods(model, items, progress.advance)
    if not sums.isfinite().all():
        raise PicogptError(f"{source} computes NaN: its weights are damaged, or too large for {dtype}")
    means = sums / torch.tensor([[len(ending) for ending in item.endings] for item in items])
    labels = torch.tensor([item.label for item in items])
    correct, correct_norm = (int((scores.argmax(1) == labels).sum()) for scores in (sums, means))
    config = {"source": source, "dtype": dtype, "limit": limit, "file": path.name, "sha256": sha256_file(path)}
    return {
        **record,
        "corpus": {},
        "config": {"model": model.config.model_dump(), **config},
        "units": {"acc": "share of items, by the sum of log-probabilities", "acc_norm": "by their mean per token"},
        "results": {
            "items": len(items),
            "acc": correct / len(items),
            "acc_norm": correct_norm / len(items),
            "correct": correct,
            "correct_norm": correct_norm,
            "shortened_contexts": sum(len(a.context) > len(b.context) for a, b in zip(whole, items, strict=True)),
        },
    }
