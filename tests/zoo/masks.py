"""Rows that are masked altogether."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.base import Small, bug, rows

NEVER = float("-inf")


@bug("aten._softmax", "fully_masked")
class MaskedSoftmax(Small):
    def loss(self, h, y, s):
        scores = h.masked_fill(s == 0, NEVER)
        return torch.softmax(scores, dim=-1)[:, 0].sum()  # <- here


@bug("aten._log_softmax", "fully_masked")
class MaskedLogSoftmax(Small):
    def loss(self, h, y, s):
        scores = torch.where(s > 0, h, NEVER)
        return F.nll_loss(scores.log_softmax(-1), y)  # <- here


@bug("aten._log_softmax", "fully_masked")
class CrossEntropyOfMaskedLogits(Small):
    def loss(self, h, y, s):
        return F.cross_entropy(h.masked_fill(s == 0, NEVER), y)  # <- here


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(2, 6)

    def forward(self, tokens, visible):
        q, k, v = self.qkv(tokens).chunk(3, -1)
        scores = q @ k.mT / 2**0.5
        scores = scores.masked_fill(~visible[:, None, :], NEVER)
        return scores.softmax(-1) @ v  # <- here


@bug("aten._softmax", "fully_masked", module="encoder.attn", source=Attention)
class PaddedSequence(Small):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"attn": Attention()})

    def loss(self, h, y, s):
        return self.encoder["attn"](h.view(-1, 2, 2), (s > 0).expand(-1, 2)).square().mean()


class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, tokens, hidden):
        out, _ = self.attn(tokens, tokens, tokens, key_padding_mask=hidden)  # <- here
        return out


@bug("aten._softmax", "fully_masked", module="block.attn", source=MultiHead)
class KeyPaddingMask(Small):
    def __init__(self):
        super().__init__()
        self.block = MultiHead()

    def loss(self, h, y, s):
        return self.block(h.view(-1, 2, 2), (s == 0).expand(-1, 2)).square().mean()


@bug("aten.logsumexp", "fully_masked")
class LogSumExpOfNothing(Small):
    def loss(self, h, y, s):
        total = torch.logsumexp(h.masked_fill(s == 0, NEVER), dim=1)  # <- here
        return total.mean()


@bug("aten.amin", "fully_masked")
class HardestPositiveOfNone(Small):
    def loss(self, h, y, s):
        distance = h.square()
        hardest = distance.masked_fill(s == 0, float("inf")).amin(dim=1)  # <- here
        return hardest.mean()


@bug("aten.max", "fully_masked")
class BestOfNone(Small):
    def loss(self, h, y, s):
        best, _ = h.masked_fill(s == 0, NEVER).max(dim=1)  # <- here
        return -best.sum()


def _with_masks():
    return [(x, y, torch.full((4,), NEVER if float(s) == 0 else 0.0)) for x, y, s in rows()]


@bug("aten._softmax", "fully_masked", data=_with_masks)
class MaskInTheBatch(Small):
    """A float mask of 0 and -inf, as the collation makes it."""

    def training_step(self, batch, batch_idx):
        x, _, mask = batch
        return F.softmax(self.body(x) + mask, -1).square().mean()  # <- here


@bug("aten._softmax", "fully_masked")
class CausalBuffer(Small):
    """The buffer's -inf is meant; with the padding it leaves nothing of a row."""

    def __init__(self):
        super().__init__()
        self.register_buffer("causal", torch.full((4, 4), NEVER).triu(1))

    def loss(self, h, y, s):
        scores = h[:, :, None] * h[:, None, :] + self.causal
        scores = scores.masked_fill(s[:, :, None] == 0, NEVER)
        return scores.softmax(-1).square().mean()  # <- here


@bug("aten._softmax", "fully_masked")
class LogOfAMask(Small):
    def loss(self, h, y, s):
        keep = s.expand(-1, 4).clone()
        keep[:, 3] = 0
        return F.softmax(h + keep.log(), dim=-1).square().mean()  # <- here


@bug("aten._log_softmax", "fully_masked")
class LegalMoves(Small):
    def __init__(self):
        super().__init__()
        self.policy = nn.Linear(4, 4)

    def loss(self, h, y, s):
        legal = (s > 0) & (torch.arange(4) != 2)
        logits = self.policy(h)
        logits[~legal] = NEVER
        chosen = F.log_softmax(logits, dim=1)  # <- here
        return -chosen[:, 0].mean()


@bug("aten._softmax", "fully_masked", samples=(0, 7), bad=(0, 7))
class TopKOfNone(Small):
    def loss(self, h, y, s):
        least = h.topk(2, dim=1).values[:, -1:]
        kept = h.masked_fill((h < least) | (s == 0), NEVER)
        return (F.softmax(kept, dim=1) * h).sum(1).mean()  # <- here


@bug("aten._softmax", "fully_masked", trainer={"precision": "bf16-mixed"})
class MaskedInHalf(Small):
    def loss(self, h, y, s):
        return torch.softmax(h.masked_fill(s == 0, NEVER), dim=-1)[:, 0].sum()  # <- here


@bug("aten.sub", "fully_masked")
class CategoricalOfNothing(Small):
    def loss(self, h, y, s):
        actions = torch.distributions.Categorical(logits=h.masked_fill(s == 0, NEVER), validate_args=False)  # <- here
        return -actions.log_prob(y).mean()


@bug("aten.sub", "fully_masked")
class LogSoftmaxByHand(Small):
    def loss(self, h, y, s):
        z = h.masked_fill(s == 0, NEVER)
        return -(z - z.logsumexp(1, keepdim=True))[:, 0].mean()  # <- here
