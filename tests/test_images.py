"""Reading pictures: every kind of file a user may have, every kind of array a user may give, the way back."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dynattn.data import MEAN, STD, augment, normalise, photograph, read_image, to_input, to_rgb


@pytest.fixture
def pixels() -> np.ndarray:
    """A picture whose corners tell every rotation, mirroring and exchange of channels."""
    array = np.full((20, 30, 3), 90, dtype=np.uint8)
    array[:10, :15], array[:10, 15:], array[10:, :15] = (250, 10, 20), (30, 240, 40), (50, 60, 230)
    return array


def corners(picture: Image.Image) -> list[tuple[int, int, int]]:
    width, height = picture.size
    return [picture.getpixel(xy) for xy in ((0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1))]


def saved(picture: Image.Image, path, **options):
    picture.save(path, **options)
    return path


# ---------------------------------------------------------------- files


def test_path_string_picture_and_array_read_alike(pixels, tmp_path):
    path = saved(Image.fromarray(pixels), tmp_path / "a.png")
    for source in (path, str(path), Image.open(path), Image.fromarray(pixels), pixels):
        picture = read_image(source)
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(pixels, tmp_path, orientation):
    upright = Image.fromarray(pixels)
    lying = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(lying[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(stored, tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(path)), pixels)
    assert np.array_equal(np.asarray(read_image(Image.open(path))), pixels)


def test_grey(pixels, tmp_path):
    grey = Image.fromarray(pixels[..., 0])
    for source in (saved(grey, tmp_path / "a.png"), pixels[..., 0], pixels[..., :1]):
        assert np.array_equal(np.asarray(read_image(source)), pixels[..., [0, 0, 0]])


def test_one_bit(pixels, tmp_path):
    path = saved(Image.fromarray(pixels[..., 0]).convert("1", dither=0), tmp_path / "a.png")
    assert corners(read_image(path)) == [(255,) * 3, (0,) * 3, (0,) * 3, (0,) * 3]


@pytest.mark.parametrize("kind", ["png", "pgm", "tif"])
def test_sixteen_bit_grey_keeps_its_brightness(tmp_path, kind):
    levels = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    path = saved(Image.fromarray(levels), tmp_path / f"a.{kind}")
    assert np.array_equal(np.asarray(read_image(path))[..., 1], [[0, 100], [200, 255]])


def test_sixteen_bit_colour(tmp_path):
    row = struct.pack(">B3H3H", 0, 257 * 10, 257 * 20, 257 * 30, 65535, 0, 257 * 128)
    chunks = [(b"IHDR", struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    (tmp_path / "a.png").write_bytes(png)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), [[[10, 20, 30], [255, 0, 128]]])


def test_floating_tiff(tmp_path):
    levels = np.array([[0.0, 0.2], [0.6, 1.0]], dtype=np.float32)
    path = saved(Image.fromarray(levels), tmp_path / "a.tif")
    assert np.array_equal(np.asarray(read_image(path))[..., 0], [[0, 51], [153, 255]])
    for wrong in (levels * 300, levels - 0.5, levels * np.nan):
        with pytest.raises(ValueError, match="grey levels from 0 to 1 in mode 'F'"):
            read_image(saved(Image.fromarray(wrong.astype(np.float32)), tmp_path / "b.tif"))


def test_transparency_goes_over_white(pixels, tmp_path):
    alpha = np.full((20, 30, 1), 255, dtype=np.uint8)
    alpha[:10, :15], alpha[:10, 15:] = 0, 51
    rgba = np.concatenate([pixels, alpha], axis=2)
    for source in (saved(Image.fromarray(rgba), tmp_path / "a.png"), rgba):
        first, second, third, _ = corners(read_image(source))
        assert first == (255, 255, 255)
        assert np.allclose(second, np.array([30, 240, 40]) * 0.2 + 255 * 0.8, atol=1)
        assert third == (50, 60, 230)


def test_grey_with_transparency(tmp_path):
    path = saved(Image.fromarray(np.array([[[0, 0], [40, 255]]], dtype=np.uint8), "LA"), tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(path))[..., 0], [[255, 40]])


def test_palette_and_its_transparency(pixels, tmp_path):
    palette = Image.fromarray(pixels).quantize(4)
    assert np.allclose(
        corners(read_image(saved(palette, tmp_path / "a.png"))), corners(Image.fromarray(pixels)), atol=3
    )
    path = saved(palette, tmp_path / "b.png", transparency=palette.getpixel((0, 0)))
    assert corners(read_image(path))[0] == (255, 255, 255)


@pytest.mark.parametrize("kind", ["jpg", "tif"])
def test_cmyk(pixels, tmp_path, kind):
    path = saved(Image.fromarray(pixels).convert("CMYK"), tmp_path / f"a.{kind}")
    assert Image.open(path).mode == "CMYK"
    assert np.allclose(corners(read_image(path)), corners(Image.fromarray(pixels)), atol=12)


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    for kind in ("gif", "png", "webp"):
        path = saved(frames[0], tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:])
        red, green, blue = read_image(path).getpixel((3, 3))
        assert red > 240 and green < 12 and blue < 12, kind


def test_one_pixel(tmp_path):
    path = saved(Image.new("RGB", (1, 1), (10, 20, 30)), tmp_path / "a.png")
    assert read_image(path).getpixel((0, 0)) == (10, 20, 30)
    assert to_input(path, 7).shape == (1, 3, 7, 7)
    assert np.array_equal(to_rgb(to_input(path, 7)[0]), np.broadcast_to([10, 20, 30], (7, 7, 3)))


def test_the_picture_given_is_left_alone(pixels):
    picture = Image.fromarray(pixels)
    read_image(picture).paste("white", (0, 0, 30, 20))
    assert np.array_equal(np.asarray(picture), pixels)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "tif", "webp"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9])
def test_cut_off_files_are_named(tmp_path, kind, kept):
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / f"cut.{kind}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=f"cut.{kind}"):
        read_image(path)


def test_a_cut_off_picture_opened_by_the_user(tmp_path):
    path = saved(Image.fromarray(np.zeros((99, 99, 3), np.uint8)), tmp_path / "a.bmp")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="damaged or cut off"):
        read_image(Image.open(path))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_give_a_picture_or_a_value_error(pixels, tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("png", "jpg", "gif", "tif", "webp"):
        whole = np.frombuffer(saved(Image.fromarray(pixels), tmp_path / f"whole.{kind}").read_bytes(), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[rng.integers(0, len(whole), 5)] = rng.integers(0, 256, 5)
            (tmp_path / "damaged").write_bytes(damaged.tobytes())
            try:
                assert read_image(tmp_path / "damaged").mode == "RGB"
            except ValueError as error:
                assert "damaged" in str(error)


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"PK\x03\x04" + bytes(100), b"<svg/>"])
def test_files_that_are_no_pictures(tmp_path, content):
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a picture that Pillow can read, got '.*notes.txt'"):
        read_image(tmp_path / "notes.txt")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image: no file .*nothing.png"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="expected a picture file, got the folder"):
        read_image(tmp_path)


@pytest.mark.parametrize("side", [10_000, 20_000, 60_000])
def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path, side):
    header = struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    (tmp_path / "bomb.png").write_bytes(png)
    with pytest.raises(ValueError, match="bomb.png' is too large"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode(mode):
    assert read_image(Image.new(mode, (4, 4))).mode == "RGB"
    with pytest.raises(ValueError, match="expected a grey, RGB or CMYK picture, got mode 'La'"):
        read_image(Image.new("La", (4, 4)))


# ---------------------------------------------------------------- arrays and other types


@pytest.mark.parametrize("dtype", ["float32", "float64", "bool"])
def test_arrays_in_zero_to_one_say_what_would_be_right(dtype):
    with pytest.raises(TypeError, match=rf"dtype uint8 .* got {dtype}.*\(255 \* image\).round\(\).astype\('uint8'\)"):
        read_image(np.ones((4, 4, 3), dtype))


@pytest.mark.parametrize("dtype", ["int64", "uint16", "complex64"])
def test_arrays_of_other_types(dtype):
    with pytest.raises(TypeError, match=f"dtype uint8 with values 0 to 255, got {dtype}$"):
        read_image(np.ones((4, 4, 3), dtype))


@pytest.mark.parametrize("shape", [(), (4,), (4, 4, 2), (4, 4, 5), (1, 4, 4, 3), (3, 8, 8)])
def test_arrays_of_other_shapes(shape):
    with pytest.raises(ValueError, match=r"expected an array \(H, W\)") as error:
        read_image(np.zeros(shape, np.uint8))
    assert ("channels come last" in str(error.value)) == (shape == (3, 8, 8))


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0), (0, 0)])
def test_empty_arrays(shape):
    with pytest.raises(ValueError, match="at least one pixel"):
        read_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("source", [None, 3, [1, 2], int])
def test_other_types(source):
    with pytest.raises(TypeError, match="expected a path, bytes, a binary file, a PIL image or a uint8 array, got"):
        read_image(source)


def test_arrays_that_are_views(pixels):
    assert np.array_equal(np.asarray(read_image(pixels[::2, ::-1])), pixels[::2, ::-1])


# ---------------------------------------------------------------- tensors


def test_to_input_is_torchvisions_usual_transform(pixels):
    expected = (torch.from_numpy(pixels).movedim(-1, 0) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    torch.testing.assert_close(to_input(pixels), expected[None])
    torch.testing.assert_close(normalise(torch.from_numpy(pixels).movedim(-1, 0)), expected)


def test_to_rgb_inverts_to_input():
    every = np.random.default_rng(0).permutation(np.arange(256 * 3, dtype=np.int64) % 256).reshape(16, 16, 3)
    assert np.array_equal(to_rgb(to_input(every.astype(np.uint8))[0]), every)
    assert np.array_equal(to_rgb(torch.full((3, 1, 1), 1e9)), np.full((1, 1, 3), 255))
    with pytest.raises(ValueError, match=r"floating tensor \(3, H, W\)"):
        to_rgb(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(("size", "shape"), [(None, (20, 30)), (12, (12, 12)), ((8, 9), (8, 9)), ([5, 40], (5, 40))])
def test_sizes(pixels, size, shape):
    assert to_input(pixels, size).shape == (1, 3, *shape)
    assert to_input(torch.randn(3, 20, 30), size).shape == (1, 3, *shape)


@pytest.mark.parametrize("size", ["large", 2.5, True, (1, 2, 3), (4.0, 4)])
def test_sizes_of_wrong_type(pixels, size):
    with pytest.raises(TypeError, match="size: expected None, an integer or a pair"):
        to_input(pixels, size)


@pytest.mark.parametrize("size", [0, -3, (4, 0)])
def test_sizes_out_of_range(pixels, size):
    with pytest.raises(ValueError, match="size: expected sides of at least 1"):
        to_input(pixels, size)


def test_floating_tensors_pass_unchanged():
    x = torch.randn(1, 3, 5, 7, dtype=torch.float64)
    assert torch.equal(to_input(x), x)
    assert torch.equal(to_input(x[0]), x)
    assert torch.equal(to_input(x, (5, 7)), x)


def test_a_tensor_is_resized_like_its_picture():
    picture = photograph("chelsea")
    by_pil = to_input(picture, 96)
    by_torch = to_input(to_input(picture), 96)
    assert (by_pil - by_torch).abs().mean() < 0.02


def test_uint8_tensors_are_pictures(pixels):
    tensor = torch.from_numpy(pixels).movedim(-1, 0)
    assert torch.equal(to_input(tensor), to_input(pixels))
    assert torch.equal(to_input(tensor[None]), to_input(pixels))
    assert torch.equal(to_input(tensor[:1]), to_input(pixels[..., 0]))
    assert torch.equal(to_input(torch.from_numpy(pixels)), to_input(pixels))
    with pytest.raises(ValueError, match=r"uint8 tensor \(C, H, W\) or \(H, W, C\)"):
        to_input(torch.from_numpy(pixels)[..., :2])


@pytest.mark.parametrize(
    "shape", [(8, 8), (1, 8, 8), (4, 8, 8), (2, 3, 8, 8), (1, 1, 8, 8), (1, 1, 3, 8, 8), (3, 0, 8)]
)
def test_tensors_of_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"expected a tensor \(3, H, W\) or \(1, 3, H, W\), got"):
        to_input(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64])
def test_tensors_of_wrong_type(dtype):
    with pytest.raises(TypeError, match="expected a floating .* or uint8 .* tensor, got torch"):
        to_input(torch.zeros(3, 8, 8, dtype=dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite(value):
    x = torch.zeros(3, 8, 8)
    x[1, 2, 3:5] = value
    with pytest.raises(ValueError, match="expected finite values, got 2"):
        to_input(x)


@pytest.mark.parametrize("function", [normalise, lambda x: augment(x, torch.Generator())])
def test_batches_must_be_pictures(function):
    with pytest.raises(TypeError, match="images: expected a uint8 tensor, got torch.float32"):
        function(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"images: expected a tensor \(\.\.\., 3, H, W\)"):
        function(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
