"""Writes `opacus_values.npz`: norms of the gradients of each example, by Opacus.

Needs torch and opacus, which the tests do not: they read what this wrote.

    python tests/ghost/references/opacus_values.py

The file holds `model/input/...`, `model/param/...`, `model/loss` [B], `model/norm` [B]
and `model/norm/...` [B] for each parameter, all as PyTorch has them: kernels of dense
layers are [outputs, inputs], those of convolutions [outputs, inputs, height, width].
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".npz")
B = 6


def networks(nn):
    """Returns {name: (module, shape of the input or number of tokens, outputs)}."""

    class Recurrent(nn.Module):
        """A recurrent layer over embedded tokens, and a norm."""

        def __init__(self):
            from opacus.layers import DPLSTM

            super().__init__()
            self.embed = nn.Embedding(11, 5)
            self.lstm = DPLSTM(5, 6, batch_first=True)
            self.norm = nn.LayerNorm(6)
            self.head = nn.Linear(6, 11)

        def forward(self, ids):
            states, _ = self.lstm(self.embed(ids))
            return self.head(self.norm(states))

    class Attention(nn.Module):
        """One head of attention over embedded tokens."""

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.norm = nn.LayerNorm(8)
            self.query = nn.Linear(8, 8)
            self.key = nn.Linear(8, 8)
            self.value = nn.Linear(8, 8, bias=False)
            self.head = nn.Linear(8, 11)

        def forward(self, ids):
            x = self.embed(ids)
            h = self.norm(x)
            scores = self.query(h) @ self.key(h).transpose(1, 2) / 8**0.5
            return self.head(x + scores.softmax(-1) @ self.value(h))

    return {
        "attention": (Attention(), (7,), 11),
        "convolutions": (
            nn.Sequential(
                nn.Conv2d(3, 4, 3, stride=2, padding=1),
                nn.Tanh(),
                nn.Conv2d(4, 6, (2, 3), padding=(1, 0), dilation=(1, 2), groups=2),
                nn.GroupNorm(2, 6),
                nn.Tanh(),
                nn.AvgPool2d((2, 1)),
                nn.Flatten(),
                nn.Linear(18, 5),
            ),
            (3, 9, 10),
            5,
        ),
        "dense": (
            nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)),
            (7,),
            5,
        ),
        "positions": (
            nn.Sequential(
                nn.Linear(4, 20), nn.LayerNorm(20), nn.GELU("tanh"), nn.Linear(20, 5)
            ),
            (3, 4),
            5,
        ),
        "recurrent": (Recurrent(), (7,), 11),
    }


def main():
    """Measures and writes."""
    import torch
    from opacus import GradSampleModule

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    found = {}
    for name, (network, shape, outputs) in networks(torch.nn).items():
        for p in network.parameters():
            p.data = (0.5 * torch.randn(p.shape)).float().double()
        tokens = name in ("attention", "recurrent")
        x = torch.randint(0, 11, (B, *shape)) if tokens else torch.randn(B, *shape)
        if tokens:
            x[:, 1] = x[:, 0]  # one id twice
        x = x if tokens else x.float().double()
        wrapped = GradSampleModule(network, loss_reduction="sum")
        logits = wrapped(x)
        labels = torch.randint(0, outputs, logits.shape[:-1])
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), reduction="none"
        )
        each = each.reshape(B, -1).mean(1)
        each.sum().backward()
        found[f"{name}/input/x"] = x.numpy() if tokens else x.float().numpy()
        found[f"{name}/input/labels"] = labels.numpy()
        found[f"{name}/loss"] = each.detach().numpy()
        squares = 0
        for path, p in network.named_parameters():
            square = p.grad_sample.reshape(B, -1).square().sum(1)
            squares = squares + square
            found[f"{name}/param/{path}"] = p.detach().float().numpy()
            found[f"{name}/norm/{path}"] = square.sqrt().numpy()
        found[f"{name}/norm"] = squares.sqrt().numpy()
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
