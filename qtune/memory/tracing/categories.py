"""What memory is for: one table of categories, with what tells each apart on a screen and in a picture."""

from collections.abc import Iterable
from dataclasses import dataclass

WEIGHTS_4BIT = "base weights 4-bit"
CONSTANTS = "quantization constants"
EMBEDDINGS = "embeddings"
HEAD = "head"
ADAPTER = "adapter"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer state"
ACTIVATIONS = "activations"
CHECKPOINTED = "checkpointed activations"
RECOMPUTED = "recomputed activations"
LOSS = "logits and loss"
WORKSPACE = "dequantized workspace"
OTHER = "other"

PAGED = "optimizer state (paged)"
HOST = "host memory"
"""These two are beside the card: in no table and in no sum."""


@dataclass(frozen=True)
class Category:
    """What bytes are for."""

    name: str
    letter: str
    """In the bar on the screen: it is read without colour, in a log file too. No two are alike, whatever their case."""
    fill: str
    """Colour of its area in a picture."""
    hatch: str = ""
    """Marks on that area (`report.drawing.Look`). No two have the same on fills of like lightness."""
    about: str = ""
    """For who meets the name for the first time, in at most 34 letters."""


_DARK, _MIDDLE, _LIGHT, _WHITE = "#34425c", "#7f90ad", "#d3dcea", "#ffffff"

CATEGORIES = (
    Category(WEIGHTS_4BIT, "4", _DARK, about="the frozen model"),
    Category("base weights int8", "8", _DARK, "-", about="the frozen model"),
    Category("base weights fp16", "6", _DARK, "/", about="the frozen model"),
    Category("base weights bf16", "b", _DARK, "x", about="the frozen model"),
    Category("base weights fp32", "f", _DARK, ".", about="the frozen model"),
    Category(CONSTANTS, "q", _WHITE, "//", about="the scale of each block of weights"),
    Category(EMBEDDINGS, "E", _MIDDLE, "|", about="the table of tokens"),
    Category(HEAD, "H", _LIGHT, "-", about="from the last layer to tokens"),
    Category(ADAPTER, "A", "#f2b880", "\\\\", about="what is trained"),
    Category(GRADIENTS, "G", "#b4622d", "+", about="of the adapter"),
    Category(OPTIMIZER, "S", "#fbe6cf", ".", about="the optimizer's, of the adapter"),
    Category(CHECKPOINTED, "C", "#2f6b53", "\\", about="inputs of layers computed twice"),
    Category(ACTIVATIONS, "V", "#7fb49b", about="kept from forward for backward"),
    Category(RECOMPUTED, "R", "#d6ebdf", "/", about="of the layer computed again"),
    Category(LOSS, "L", _WHITE, "x", about="scores of tokens, a tile at a time"),
    Category(WORKSPACE, "D", "#c9b6d8", "o", about="weights unpacked to multiply"),
    Category(OTHER, "o", _WHITE, about="what has no other name"),
)
"""In the order of tables and bars: from what stays to what comes and goes."""

ORDER = tuple(category.name for category in CATEGORIES)

ABOUT = {category.name: category.about for category in CATEGORIES}


def in_order(names: Iterable[str]) -> list[str]:
    """Category names in the order of the tables; unknown ones last, by name."""
    rank = {name: place for place, name in enumerate(ORDER)}
    return sorted(names, key=lambda name: (rank.get(name, len(rank)), name))
