"""What the package teaches dynattn: an operation, a model with its checkpoint, a recipe, a figure."""

from pathlib import Path

from matplotlib.figure import Figure
from torch import nn

import dynattn
from dynattn import figures, verify, weights
from dynattn.figures import measures
from dynattn.figures.drawing import share
from dynattn.figures.measures import attention_share, others
from dynattn.figures.run import Drawing, Paper, Plan
from dynattn.figures.tables import Row
from dynattn.models.layers import Backbone, Block, PatchEmbedding, Stage, initialise
from dynattn.training import Recipe, register_recipe
from dynattn.verify.mistakes.common import altered, of_scale, of_tokens

from .mechanism import NeighbourhoodAttention, neighbourhood_attention, neighbourhood_attention_torch


class Neighbourhood(Backbone):
    """A small backbone of two stages."""

    def __init__(self, img_size=32, in_chans=3, num_classes=10, *, dims=(8, 16), depths=(1, 1), heads=(1, 2), radius=1):
        super().__init__(img_size, in_chans, num_classes, dims=dims, depths=depths, global_pool="avg")
        self.embed, self.stages = PatchEmbedding(in_chans, dims[0], 4, 4), nn.ModuleList()
        for i, depth in enumerate(depths):
            down = PatchEmbedding(dims[i - 1], dims[i], 2, 2) if i else nn.Identity()
            layers = [Block(dims[i], NeighbourhoodAttention(dims[i], heads[i], radius)) for _ in range(depth)]
            self.stages.append(Stage(down, layers))
        self.norm = nn.LayerNorm(dims[-1])
        self.add_head(0.0)
        self.apply(initialise)


def draw_case(draw):
    """A call of the operation."""
    B, h, d, H, W = draw.sizes(B=2, h=2, d=3, H=4, W=4)
    arguments = {name: draw.normal(B, h, H * W, d) for name in "qkv"} | {"query_shape": (H, W)}
    radius, scale = draw.one("radius", 1, 2), draw.scale()
    return arguments, ({} if radius == 1 else {"radius": radius}) | scale


MISTAKES = {
    **of_scale(neighbourhood_attention_torch),
    **of_tokens(neighbourhood_attention_torch),
    "one cell too far": altered(neighbourhood_attention_torch, radius=lambda a: a.radius + 1),
}


def neighbours(setting) -> Drawing:
    """What the middle query reads, and how much attention falls on the object."""
    (picture,) = setting.pictures((3,))
    figure = Figure(figsize=(4, 4))
    figure.subplots().imshow(picture.shown)
    measure = share("attention", setting.table(), setting.subject.name)
    return Drawing(figure, "Neighbours.", [picture], [measure], [setting.subject.story], setting.evaluations())


def evaluate(model, images, masks, labels, bar=None):
    """Attention on the object, of every layer."""

    def measure(trace, masks, i):
        for record in trace:
            for mask, where in {"own": masks[i].float(), "other": others(masks, i)}.items():
                yield Row(record.name, -1, mask, "attention", attention_share(record, where))

    return measures.evaluate(model, images[:4], masks[:4], labels[:4], measure, bar=bar)


weights.add_folder(Path(__file__).parent)
dynattn.register_model("neighbourhood_mini", Neighbourhood, radius=2)
verify.register(neighbourhood_attention, draw_case, MISTAKES)
register_recipe(
    "neighbourhood_mini",
    Recipe("neighbourhood_mini", size=32, train_count=32, test_count=16, steps=2, batch=8),
    seeds=[0],
    folder=Path(__file__).parent,
)
figures.register(
    "neighbourhood",
    Paper(
        "Neighbourhood attention",
        shipped="neighbourhood_mini",
        kind="neighbourhood",
        evaluate=evaluate,
        twins=lambda setting: {"random weights": setting.twin(setting.subject)},
        random=("as training starts",),
        plans={1: Plan("neighbours", "Figure 1", neighbours, lambda setting: {})},
    ),
)
