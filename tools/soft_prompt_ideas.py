"""What might make a soft prompt learn better and is no key of a recipe: tried by the search, apart from the product."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtune.data.masks import IGNORED


@dataclass(frozen=True)
class Ideas:
    """The "ideas" table of a configuration; without one a run is what `qtune run` does."""

    noise: float = 0.0
    """Normal noise on the vectors of every step, as a share of their size."""
    drop: float = 0.0
    """Share of the virtual tokens that a step does not see."""
    cap: float | None = None
    """Largest norm of a vector, in those of a mean word; longer ones are scaled down to it."""
    text_noise: float = 0.0
    """NEFTune's alpha (arXiv:2310.05914): uniform noise on the embeddings of the rows."""
    word_dropout: float = 0.0
    """Share of an answer's tokens that stand as a random token where later ones are predicted (arXiv:1511.06349)."""
    label_smoothing: float = 0.0
    """Share of the target that all of the vocabulary gets (arXiv:1512.00567, section 7)."""
    focal: float = 0.0
    """A token's loss counts (1 - its probability) to this power (arXiv:1708.02002)."""
    encoder_decay: float | None = None
    """AdamW's decay of the network's weights, instead of training.weight_decay."""
    vector_decay: float | None = None
    """The same of the table that begins as the words."""
    decay_to_start: bool = False
    """Decay towards what the weights began as, not towards zero (L2-SP, arXiv:1802.01483)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    last_rate: float = 0.0
    """Share of the peak rate below which the schedule does not fall."""
    mixture: int = 0
    """A vector is a sum of so many rows, the starts of all vectors and others of the vocabulary, and the shares are
    what is trained (arXiv:2406.05279)."""

    @classmethod
    def of(cls, table: dict[str, Any]) -> "Ideas":
        if unknown := set(table) - {field.name for field in fields(cls)}:
            raise ValueError(f"unknown ideas: {', '.join(sorted(unknown))}")
        return cls(**{key: tuple(value) if key == "betas" else value for key, value in table.items()})

    def capped(self, vectors: Tensor, word: float) -> Tensor:
        """[virtual, hidden]. `word`: norm of a mean word."""
        if self.cap is None:
            return vectors
        norms = vectors.float().norm(dim=1, keepdim=True)
        return vectors * (self.cap * word / norms).clamp(max=1.0).to(vectors.dtype)

    def noisy(self, vectors: Tensor, draw: torch.Generator) -> Tensor:
        """[virtual, hidden], in a step of training."""
        if not self.noise:
            return vectors
        size = vectors.detach().float().pow(2).mean(dim=1, keepdim=True).sqrt()
        shape = vectors.shape
        noise = torch.randn(shape, generator=draw, device=vectors.device)
        return vectors + (self.noise * size * noise).to(vectors.dtype)

    def noisy_text(self, text: Tensor, mask: Tensor, draw: torch.Generator) -> Tensor:
        """[rows, length, hidden], in a step of training."""
        if not self.text_noise:
            return text
        size = self.text_noise / (mask.sum(dim=1) * text.shape[2]).float().sqrt()
        noise = torch.rand(text.shape, generator=draw, device=text.device) * 2 - 1
        return text + (size[:, None, None] * noise).to(text.dtype)

    def seen(self, rows: int, virtual: int, draw: torch.Generator) -> Tensor:
        """Which virtual tokens the rows of a step see, [rows, virtual] of 0 and 1, on the CPU; the first one always."""
        kept = torch.rand((rows, virtual), generator=draw) >= self.drop
        kept[:, 0] = True
        return kept.long()

    def with_wrong_words(
        self, rows: Sequence[dict[str, Any]], draw: torch.Generator, vocabulary: int
    ) -> list[dict[str, Any]]:
        """Rows whose answers have some other tokens where they are read, and the same where they are predicted."""
        if not self.word_dropout:
            return list(rows)
        changed = []
        for row in rows:
            ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            wrong = (labels != IGNORED) & (torch.rand(len(ids), generator=draw) < self.word_dropout)
            ids = torch.where(wrong, torch.randint(vocabulary, (len(ids),), generator=draw), ids)
            changed.append(row | {"input_ids": ids.tolist()})
        return changed

    def loss_of(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Of each token, [tokens], in a step of training."""
        nll = functional.cross_entropy(logits, wanted, reduction="none", label_smoothing=self.label_smoothing)
        if not self.focal:
            return nll
        return nll * (1 - torch.exp(-nll.detach())) ** self.focal


class Mixture(nn.Module):
    """Vectors as sums of the same rows, each vector by shares of its own; it begins as its start."""

    def __init__(self, starts: Tensor, words: Tensor, count: int, draw: torch.Generator) -> None:
        """starts: [virtual, hidden]. words: [vocabulary, hidden], of which `count` - virtual rows are drawn and made as
        large as the starts."""
        super().__init__()
        drawn = words[
            torch.randperm(len(words), generator=draw)[: max(0, count - len(starts))].to(words.device)
        ].float()
        starts = starts.detach().float()
        drawn = drawn * (starts.norm(dim=1).mean() / drawn.norm(dim=1).mean() if len(drawn) else 1.0)
        self.rows = torch.cat([starts, drawn])
        self.shares = nn.Parameter(torch.eye(len(starts), len(self.rows), device=starts.device))

    def forward(self, numbers: Tensor) -> Tensor:
        """[..., virtual] -> [..., virtual, hidden]"""
        vectors: Tensor = self.shares @ self.rows
        return vectors[numbers]


class Decay:
    """Decoupled decay of the parts of a prompt, by a rate of its own each, as AdamW has it but with a choice of where
    to."""

    def __init__(self, ideas: Ideas, table: Tensor | None, network: Sequence[Tensor]) -> None:
        """table: what begins as the words; network: the other weights that are trained."""
        parts = [(ideas.vector_decay, [] if table is None else [table]), (ideas.encoder_decay, list(network))]
        self.parts = [(decay, weights) for decay, weights in parts if decay and weights]
        self.starts = [
            [weight.detach().clone() for weight in weights] if ideas.decay_to_start else None
            for _, weights in self.parts
        ]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for (decay, weights), starts in zip(self.parts, self.starts, strict=True):
            torch._foreach_mul_(weights, 1 - rate * decay)
            if starts is not None:
                torch._foreach_add_(weights, starts, alpha=rate * decay)
