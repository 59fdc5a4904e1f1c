"""The differentiable operations under one roof. Each stands, with its equations and loops, in its mechanism's file."""

from dynattn.core import dense_attention, sample_points
from dynattn.mechanisms.bilevel import bilevel_attention, routed_attention
from dynattn.mechanisms.deformable import deformable_attention
from dynattn.mechanisms.deformable_detr import detr_attention
from dynattn.mechanisms.dynamic_group import grouped_attention
from dynattn.mechanisms.window import window_attention

__all__ = [
    "bilevel_attention",
    "deformable_attention",
    "dense_attention",
    "detr_attention",
    "grouped_attention",
    "routed_attention",
    "sample_points",
    "window_attention",
]
