"""Logits of DAT under deterministic weights (`deterministic.py`, by the published names), as plain numbers.

dat_tiny's are the published code's. Of the others it is known how far the two images' logits lie apart, which agrees;
dat_tiny_conv's checkpoint layout was never seen, and its numbers only hold our code to itself.
"""

# name: (side of the image, the first four logits of image 0, the last two of image 1, what the published code measured:
# root mean square of the difference of the two images' logits)
LOGITS = {
    "dat_tiny": (
        224,
        [0.103254315559, -0.510921767845, -1.570284396298, 1.231217851737],
        [-0.600555163001, 0.219858386437],
        0.148,
    ),
    "dat_tiny_conv": (
        224,
        [-0.196836468024, -0.151925579987, 0.488676290989, -0.347074883097],
        [-0.815435161128, 0.317493642603],
        None,
    ),
    "dat_small": (
        224,
        [0.12085073427, -1.117335513829, -0.604681379963, 1.027410657365],
        [-2.352944378081, 0.310752604893],
        0.126,
    ),
    "dat_base": (
        224,
        [0.589074292294, 0.439305045075, -1.563553504072, -0.469407931549],
        [-0.643270484276, 0.786904138084],
        0.129,
    ),
    "dat_base_384": (
        384,
        [0.675132163164, 0.902094476078, -1.696146868961, -0.298693489959],
        [-0.734013324097, 0.779659376595],
        0.081,
    ),
}
