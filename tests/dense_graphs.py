"""Item graphs as whole matrices, the published way, for tests of what never makes one."""

import torch
from torch.nn.functional import normalize


def nearest(x, k, present=None):
    """The similarity matrix, its k largest a row; none of items that are not present (``(n,)`` bool), whose own rows are empty."""
    present = torch.ones(len(x), dtype=torch.bool) if present is None else present
    similarity = normalize(x) @ normalize(x).T
    top = torch.topk(similarity.masked_fill(~present, -2.0), min(k, int(present.sum())))
    return torch.zeros_like(similarity).scatter(1, top.indices, similarity.gather(1, top.indices)) * present.unsqueeze(1)


def sym(s):
    """D^-1/2 S D^-1/2; empty rows stay so."""
    root = s.sum(1).clamp(min=1e-300).pow(-0.5)
    return root[:, None] * s * torch.where(s.sum(1) > 0, root, 0.0)


def spread(s, value, present=None):
    """The graph with the same value everywhere in the rows of items that are not present."""
    return s if present is None else torch.where(present.unsqueeze(1), s, value)
