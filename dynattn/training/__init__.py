"""Training the small models: `train(name)`, resumable to the bit, from one CPU core to many processes."""

from .loop import evaluate, export, fit, train
from .recipes import Recipe, get_recipe, recipes, register_recipe

__all__ = ["Recipe", "evaluate", "export", "fit", "get_recipe", "recipes", "register_recipe", "train"]
