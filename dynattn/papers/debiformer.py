"""DeBiFormer: the rows of its tables, the recipe of its small model."""

from dynattn.training import Recipe, register_recipe

register_recipe("debiformer_mini", Recipe("debiformer_mini"))
