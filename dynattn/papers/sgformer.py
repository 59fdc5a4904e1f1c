"""SG-Former: the rows of its tables, the recipe of its small model."""

from dynattn.training import Recipe, register_recipe

register_recipe("sgformer_mini", Recipe("sgformer_mini"), seeds=[0])
