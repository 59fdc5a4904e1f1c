"""The figures of HLG (Zhang et al., IJCV 2024): segmentation beside a Pyramid Vision Transformer, in small."""

from . import segmentation
from .run import Drawing, Paper, Plan, Setting
from .segmentation import evaluate_segmentation
from .subjects import RANDOM, Subject

SEEN = (19, 1, 28)  # test images, chosen for a spread of classes, not by what a model makes of them
BESIDE = ("pvt_seg_mini", "setr_pup_hlg_mini")
NOTE = (
    "The decoders differ too, and the PVT has more parameters: the difference is not the backbone's alone. The paper "
    "has UperNet under both. "
)


def compared(setting: Setting) -> list[Subject]:
    """The PVT and SETR-PUP-HLG; another model stands alone."""
    return segmentation.beside(setting, BESIDE)


def segmented(setting: Setting) -> Drawing:
    """Figure 9 in small: photograph, truth, PVT, HLG."""
    return segmentation.drawing(
        setting, compared(setting), SEEN, PLANS[9].title, to=segmentation.WRITTEN["pvt_seg_mini"], note=NOTE
    )


def measured(setting: Setting) -> dict[str, int]:
    """The networks that are measured, and on how many images."""
    return segmentation.networks_of(setting, compared(setting))


PLANS = {
    9: Plan(
        "segmentation",
        "Figure 9 · Segmentation: HLG beside a PVT",
        segmented,
        measured,
        unfit=segmentation.answers_pixels,
    ),
}
PAPER = Paper(
    "HLG",
    shipped="setr_pup_hlg_mini",
    kind="local_global",
    evaluate=evaluate_segmentation,
    twins=lambda setting: {RANDOM: setting.twin(setting.subject)},
    random=("of one seed",),
    plans=PLANS,
    level="cluttered",
)
