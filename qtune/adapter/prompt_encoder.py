"""A soft prompt that begins at words: trained vectors, and what a network adds to them, in the vocabulary's own unit.

peft's p-tuning computes its vectors by a network alone, from noise, and its prompt tuning trains them bare. Here a
vector is v + f(v): f is the network of p-tuning, or one hidden layer that all vectors of prompt tuning share (residual
prompt tuning, Razdaibiedina et al. 2023, arXiv:2305.03937, section 3). The last layer of f begins at zero, so that the
prompt begins as exactly the embeddings that v was given; in the paper a layer norm behind f moves it away at once.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from qtune.recipe.schema import PromptTuning, PTuning

UNIT_ROWS = 4096
"""Rows of the vocabulary, evenly spaced, that the unit is taken from."""


class ResidualPrompt(nn.Module):
    """Vectors [1, virtual, hidden] = vector_scale * unit * (v + f(x)), with v = vector_rate * the table that begins as
    the words.

    x, what the network reads: v itself in prompt tuning; in p-tuning `embedding`, peft's own noise, which has a row for
    each virtual token that is unlike all others. Words are too much alike: one network makes nearly one vector of them.

    unit: what the rows of the vocabulary measure (root mean square), so that v is of size 1 and a learning rate means
    the same for every base. Adam's steps do not depend on a factor before a parameter, so that `vector_rate` makes the
    vectors move by that multiple of the learning rate. A layer that norms its input reads `vector_scale` times a vector
    as that vector, but what it adds counts for so much less beside it: large vectors reach every layer nearly as
    they are, and are trained for all of them.
    """

    def __init__(self, made: nn.Module, mlp: nn.Sequential | None, vector_rate: float, vector_scale: float) -> None:
        """made: peft's encoder, whose parts are taken over. mlp: f of prompt tuning; None: peft's network."""
        super().__init__()
        assert isinstance(made.embedding, nn.Embedding)
        self.embedding = made.embedding
        self.lstm_head = getattr(made, "lstm_head", None)
        self.mlp_head: nn.Sequential = made.mlp_head if mlp is None else mlp  # type: ignore[assignment]
        self.words = nn.Parameter(torch.zeros_like(self.embedding.weight)) if mlp is None else None
        self.vector_rate = vector_rate
        self.vector_scale = vector_scale
        self.unit = 1.0
        last = self.mlp_head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    @property
    def table(self) -> Tensor:
        """What begins as the words, [virtual, hidden]."""
        return self.embedding.weight if self.words is None else self.words

    def forward(self, indices: Tensor) -> Tensor:
        """peft gives the numbers of the virtual tokens, [1, virtual], and expects [1, virtual, hidden]."""
        v: Tensor = self.vector_rate * functional.embedding(indices, self.table)
        read = v if self.words is None else self.embedding(indices)
        if self.lstm_head is not None:
            read = self.lstm_head(read)[0]
        return self.vector_scale * self.unit * (v + self.mlp_head(read))

    @torch.no_grad()
    def begin_at(self, vectors: Tensor) -> None:
        """Makes `vector_scale` times `vectors` [virtual, hidden] what is computed until the first step."""
        self.table.copy_(vectors / (self.unit * self.vector_rate))


def make_residual(model: PeftModel, adapter: PromptTuning | PTuning) -> None:
    """Puts the encoder in the place of peft's, which has made the parts that it is made of."""
    made, mlp = model.prompt_encoder[model.active_adapter], None
    if isinstance(adapter, PromptTuning):
        table = made.embedding.weight
        hidden = made.embedding.embedding_dim
        width = adapter.encoder_hidden_size or hidden
        mlp = nn.Sequential(nn.Linear(hidden, width), nn.ReLU(), nn.Linear(width, hidden)).to(table.device)
    model.prompt_encoder[model.active_adapter] = ResidualPrompt(made, mlp, adapter.vector_rate, adapter.vector_scale)


def measure_unit(model: PeftModel) -> None:
    """Gives a residual prompt its base's unit, without which its parameters mean nothing; other adapters have none."""
    for encoder in residual_prompts(model):
        encoder.unit = unit_of(model.get_base_model().get_input_embeddings())


def residual_prompts(model: PeftModel) -> list[ResidualPrompt]:
    """Those of its soft prompts that are residual: one or none."""
    encoders = getattr(model, "prompt_encoder", {}).values()
    return [encoder for encoder in encoders if isinstance(encoder, ResidualPrompt)]


@torch.no_grad()
def unit_of(words: Any) -> float:
    """Root mean square of the vocabulary's rows as the model reads them, to three digits: those that do not depend on
    the order in which a processor adds. `words` is the embedding, which maps ids to vectors."""
    rows, device = int(words.weight.shape[0]), words.weight.device
    ids = torch.linspace(0, rows - 1, min(rows, UNIT_ROWS)).long().to(device)
    return float(f"{words(ids).float().pow(2).mean().sqrt().item():.3g}")
