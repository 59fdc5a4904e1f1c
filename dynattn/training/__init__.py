"""Training the small models: `train(name)`, resumable to the bit, from one CPU core to many processes."""

from .loop import export, fit, train
from .recipes import Recipe, get_recipe, recipes, register_recipe
from .shipping import print_runs, train_all
from .tasks import TASKS, evaluate

__all__ = [
    "TASKS",
    "Recipe",
    "evaluate",
    "export",
    "fit",
    "get_recipe",
    "print_runs",
    "recipes",
    "register_recipe",
    "train",
    "train_all",
]
