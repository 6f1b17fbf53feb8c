"""Images as people have them: damaged metadata, color profiles, other formats under the name of a JPEG."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from facevae_jax.data.layouts.folder import folder_layout
from facevae_jax.data.sources import images
from tests.test_odd_files import PIXELS, png, splits


def chunk(kind, data, crc=None):
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def with_chunks(*chunks, at_end=False):
    data = png()
    place = data.index(b"IEND") - 4 if at_end else data.index(b"IDAT") - 4
    return data[:place] + b"".join(chunks) + data[place:]


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    "bad",
    [
        chunk(b"tEXt", b"Comment\0text", crc=1),
        chunk(b"iTXt", b"no zero byte"),
        chunk(b"zTXt", b"Key\0\0" + zlib.compress(b"x" * 2**22)),
        chunk(b"zTXt", b"Key\0\0no stream"),
        chunk(b"iCCP", b"p\0\0" + zlib.compress(b"x" * 2**21)),
        chunk(b"eXIf", b"no data"),
        chunk(b"tIME", b"short", crc=7),
    ],
    ids=["text crc", "itxt", "large", "stream", "profile", "exif", "time"],
)
def test_damaged_or_large_metadata_cost_no_pixel(bad, at_end, recwarn):
    loaded, _ = images.load(with_chunks(bad, at_end=at_end), images.Task(images.CENTER_SQUARE, 40))
    np.testing.assert_array_equal(np.asarray(loaded), PIXELS)


def test_a_damaged_text_costs_neither_rotation_nor_profile():
    exif = Image.Exif()
    exif[0x0112] = 6
    task = images.Task(images.CENTER_SQUARE, 40)
    for options in ({"exif": exif}, {"icc_profile": _gamma_profile(1.0)}):
        whole = png(**options)
        at = whole.index(b"IDAT") - 4
        expected = np.asarray(images.load(whole, task)[0])
        assert np.abs(expected.astype(int) - PIXELS).max() > 20
        for bad in (chunk(b"tEXt", b"Comment\0x", crc=1), chunk(b"zTXt", b"K\0\0" + zlib.compress(b"x" * 2**22))):
            found, _ = images.load(whole[:at] + bad + whole[at:], task)
            np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x1cftypavif", "AVIF"),
        (b"GIF89a", "GIF"),
        (b"II*\0", "TIFF"),
        (b"version https://git-lfs", "Git LFS"),
        (b"<svg", "web site"),
    ],
)
def test_what_is_no_image_in_spite_of_its_name_is_named(tmp_path, start, expected):
    (tmp_path / "a.jpg").write_bytes(start + b" " * 64)
    assert expected in images.convert(tmp_path / "a.jpg", images.Task(images.CENTER_SQUARE, 32)).failure


def test_jfif_files_are_jpegs(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.JFIF", "JPEG")
    assert splits(folder_layout(tmp_path)) == {"train": ["a.JFIF"]}


def test_profiles_fit_the_pixels_that_they_are_for():
    """Linear light is no sRGB, whatever its name; transparency stays; an RGB profile of a gray image is used too."""
    task, linear = images.Task(images.CENTER_SQUARE, 40), _gamma_profile(1.0, name=b"GIMP built-in Linear sRGB")
    expected, _ = images.load(png(icc_profile=_gamma_profile(1.0)), task)
    np.testing.assert_array_equal(np.asarray(images.load(png(icc_profile=linear), task)[0]), np.asarray(expected))
    gray = PIXELS[..., 0]
    both = [images.load(png(p, icc_profile=linear), task)[0] for p in (gray, np.stack([gray] * 3, axis=2))]
    assert np.abs(np.asarray(both[0]).astype(int) - np.asarray(both[1])).max() <= 1
    for space in (b"GRAY", b"CMYK"):  # of other pixels: it is left out
        other = linear[:16] + space + linear[20:]
        np.testing.assert_array_equal(np.asarray(images.load(png(icc_profile=other), task)[0]), PIXELS)
    keyed = PIXELS.copy()
    keyed[:8, :8] = (1, 2, 3)
    found, _ = images.load(png(keyed, icc_profile=linear, transparency=(1, 2, 3)), task)
    assert (np.asarray(found)[:8, :8] == 255).all()


def test_damaged_pixels_are_still_refused():
    good = png()
    for damaged in (good[:-300], good[:200] + bytes([good[200] ^ 1]) + good[201:], good[:60]):
        with pytest.raises((OSError, SyntaxError, ValueError)):
            images.load(damaged, images.Task(images.CENTER_SQUARE, 40))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Metadata Warning")
def test_odd_exif_data_leave_the_picture_as_it_is():
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 1, (0, 0)  # a resolution of 0 / 0
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=95)
    images.load(buffer.getvalue(), images.Task(images.CENTER_SQUARE, 40))
    images.load(png(exif=exif), images.Task(images.CENTER_SQUARE, 40))


def test_a_color_profile_is_converted_and_that_of_srgb_changes_nothing():
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    task = images.Task(images.CENTER_SQUARE, 40)
    same, _ = images.load(png(icc_profile=lab), task)
    np.testing.assert_array_equal(np.asarray(same), PIXELS)
    swapped = _gamma_profile(1.0)
    converted, _ = images.load(png(icc_profile=swapped), task)
    expected = np.where((x := PIXELS / 255) <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055) * 255
    assert np.abs(np.asarray(converted) - expected).mean() < 3.0  # linear light to sRGB
    ruined, _ = images.load(png(icc_profile=b"no profile" * 20), task)
    np.testing.assert_array_equal(np.asarray(ruined), PIXELS)


def _gamma_profile(gamma, name=b"linear"):
    """An ICC profile (version 2) with the primaries of sRGB and a curve of a power."""

    def number(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(*values):
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    text = name
    parts = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + b"\0" + b"\0" * 79,
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.4361, 0.2225, 0.0139),
        b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"bXYZ": xyz(0.1431, 0.0606, 0.7141),
        **{name: b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) for name in (b"rTRC", b"gTRC", b"bTRC")},
    }
    table, body, at = b"", b"", 128 + 4 + 12 * len(parts)
    for name, data in parts.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    size = at + len(body)
    header = struct.pack(">I", size) + b"\0" * 4 + b"\x02\x10\0\0" + b"mntrRGB XYZ " + b"\0" * 12 + b"acsp" + b"\0" * 88
    return (
        header[:68]
        + number(0.9642)
        + number(1.0)
        + number(0.8249)
        + header[80:]
        + struct.pack(">I", len(parts))
        + table
        + body
    )


def test_no_warning_of_pillow_names_no_file(recwarn, tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b")
    palette = Image.fromarray(PIXELS).quantize(4)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=bytes(range(4)), pnginfo=info)
    (tmp_path / "p.png").write_bytes(buffer.getvalue())
    with images.converting([tmp_path / "p.png"], images.Task(images.CENTER_SQUARE, 32), threads=1) as converted:
        assert all(image.png for image in converted)
    assert not recwarn.list
