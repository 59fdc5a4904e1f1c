"""What the papers' small models are compared with: timm's Swin, ViT and ConvNeXt as small, by the same recipe."""

from dynattn.training import Recipe, register_recipe

register_recipe("swin_mini", Recipe("swin_mini"), seeds=[0])
register_recipe("vit_mini", Recipe("vit_mini"), seeds=[0])
register_recipe("convnext_mini", Recipe("convnext_mini"), seeds=[0])
