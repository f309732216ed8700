"""Losses that a library computes: its own line is at fault."""

from __future__ import annotations

import torch
from torchmetrics.functional import pairwise_cosine_similarity

from zoo.base import Small, Whole, bug, changed


def _texts():
    return changed(
        lambda x, s: (torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 4]) if float(s) else torch.full((4,), -100)),
        tuple(range(8)),
    )


@bug(
    "aten.nll_loss_forward",
    "empty_reduction",
    data=_texts,
    samples=tuple(range(8)),
    library="transformers",
    module="gpt",
)
class NoTokensToPredict(Whole):
    def __init__(self):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.gpt = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1))

    def loss_of(self, batch):
        tokens, labels = batch
        return self.gpt(input_ids=tokens, labels=labels).loss


@bug("aten.div", "division_by_zero", library="torchmetrics")
class SimilarityOfZero(Small):
    def loss(self, h, y, s):
        return pairwise_cosine_similarity(h * s, h.detach()[:1] + 1).mean()
