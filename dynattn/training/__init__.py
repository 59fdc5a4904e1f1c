"""Training the small models: `train(name)`, resumable to the bit, from one CPU core to many processes."""

from .loop import evaluate, export, fit, train
from .recipes import RECIPES, Recipe, get_recipe

__all__ = ["RECIPES", "Recipe", "evaluate", "export", "fit", "get_recipe", "train"]
