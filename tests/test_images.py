"""From the bytes of any file to an image of the dataset, or the reason why there is none."""

import io
import json
import os
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from facevae_jax.data.drawn import synthetic
from facevae_jax.data.layouts.folder import folder_layout
from facevae_jax.data.prepared import builder, reading
from facevae_jax.data.sources.images import CENTER_SQUARE, Converted, Task, convert, encode_png
from tests.test_conversion import RESOLUTION, prepare

SQUARE = Task(CENTER_SQUARE, RESOLUTION)


def pixels(result: Converted) -> np.ndarray:
    assert not result.failure
    with Image.open(io.BytesIO(result.png)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_center_square_crop_by_hand(tmp_path):
    wide = np.zeros((32, 46, 3), np.uint8)
    wide[:, 7:39] = 255  # (46 - 32) // 2 = 7 columns go on either side
    for image in (wide, wide.swapaxes(0, 1)):
        Image.fromarray(image).save(tmp_path / "a.png")
        assert (pixels(convert(tmp_path / "a.png", SQUARE)) == 255).all()


@pytest.mark.parametrize(("format", "side"), [("JPEG", 1024), ("PNG", 1024), ("PNG", 100)])
def test_images_are_reduced_as_lanczos_alone_would(tmp_path, format, side):
    """1024 pixels to 32 in two steps: JPEG by scaled decoding, PNG by boxes; 100 pixels in one."""
    face = Image.fromarray(synthetic.faces(np.arange(1), resolution=256)[0]).resize((side, side))
    face.save(tmp_path / "a", format, quality=95)
    with Image.open(tmp_path / "a") as image:
        exact = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.LANCZOS), np.float32)
    result = convert(tmp_path / "a", SQUARE)
    assert not result.enlarged
    difference = pixels(result) - exact
    assert np.sqrt(np.mean(difference**2)) < 1.5  # levels of 255; bilinear is ten times as far off
    assert np.abs(difference.mean()) < 0.5


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["noise", "flat", "ramp"]))
@settings(max_examples=50, deadline=None)
def test_pillow_reads_the_encoded_png_back(height, width, kind):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    ramp = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    expected = {"noise": noise, "flat": np.full_like(noise, 255), "ramp": ramp}[kind]
    with Image.open(io.BytesIO(encode_png(expected))) as image:
        image.verify()  # the checksums
    np.testing.assert_array_equal(pixels(Converted(encode_png(expected))), expected)


def test_the_encoded_png_is_about_as_small_as_pillows():
    face = synthetic.faces(np.arange(1), resolution=128)[0]
    assert len(encode_png(face)) < 1.3 * len(encoded(Image.fromarray(face), "PNG", compress_level=1))


def test_what_is_transparent_becomes_white(tmp_path):
    for mode, value in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        Image.new(mode, (32, 32), value).save(tmp_path / "a.png")
        assert (pixels(convert(tmp_path / "a.png", SQUARE)) == 255).all()
    image = Image.new("P", (32, 32), 1)
    image.putpalette([9, 9, 9, 40, 50, 60])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    result = pixels(convert(tmp_path / "a.png", SQUARE))
    assert result[0, :2].tolist() == [[255] * 3, [40, 50, 60]]


def test_exif_orientation_is_applied_and_metadata_does_not_travel(tmp_path):
    image = np.zeros((32, 32, 3), np.uint8)
    image[:8] = 255  # bright at the top
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif, icc_profile=b"secret")
    converted = convert(tmp_path / "a.png", SQUARE)
    result = pixels(converted)
    assert (result[-8:] == 255).all()
    assert (result[:24] == 0).all()
    assert not [chunk for chunk in (b"eXIf", b"iCCP") if chunk in converted.png]


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_images() -> dict[str, bytes]:
    """By kind, files that are unusual and good: each is a flat (10, 200, 30) picture, or grey where it must be."""
    color = Image.new("RGB", (40, 40), (10, 200, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "cmyk.jpg": encoded(color.convert("CMYK"), "JPEG", quality=100),
        "grey.png": encoded(Image.new("L", (40, 40), 99), "PNG"),
        "grey16.png": encoded(Image.new("I;16", (40, 40), 99 * 257), "PNG"),
        "palette.png": encoded(color.quantize(4), "PNG"),
        "alpha.png": encoded(color.convert("RGBA"), "PNG"),
        "bits.png": encoded(Image.new("1", (40, 40), 1), "PNG"),
        "rotated.jpg": encoded(color, "JPEG", exif=exif),
        "progressive.jpg": encoded(color, "JPEG", progressive=True),
        "moving.webp": encoded(color, "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 40))], lossless=True),
        "wrong_extension.jpg": encoded(color, "PNG"),
        "phone.jpg": encoded(color, "MPO", save_all=True, append_images=[Image.new("RGB", (40, 40))]),
        "moving.png": encoded(color, "PNG", save_all=True, append_images=[Image.new("RGB", (40, 40))]),
        "copy.png": encoded(color.convert("RGBA"), "PNG"),  # the bytes of alpha.png
        "line\nbreak.png": encoded(color, "PNG"),
        "bytes\udcff.png": encoded(color, "PNG"),
        "thin.png": encoded(color.resize((9, 400)), "PNG"),
    }


def bad_images() -> dict[str, bytes]:
    """By kind, files that are no pictures, or damaged ones."""
    good = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)), "PNG")
    jpeg = encoded(Image.open(io.BytesIO(good)), "JPEG")
    return {
        "empty.png": b"",
        "text.jpg": b"hello",
        "html.png": b"<!doctype html><title>404</title>",
        "gif.png": encoded(Image.new("RGB", (40, 40)), "GIF"),
        "tiny.png": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "bomb.png": encoded(Image.new("1", (12_001, 12_001)), "PNG"),  # Pillow itself would only warn
        "cut.png": good[:-200],
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "header.webp": b"RIFF\x00\x00\x00\x00WEBPVP8 ",
        "flipped.png": good[:300] + bytes([good[300] ^ 1]) + good[301:],
    }


def test_a_zoo_of_files(tmp_path):
    """Each file is converted right or reported with its reason: images in = images out + reported."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    odd, bad = odd_images(), bad_images()
    generator = np.random.default_rng(0)
    for name, data in (odd | bad).items():
        (folder / name).write_bytes(data)
    good = odd["alpha.png"]
    for i in range(1000):  # any byte of a good file changed, or any number of them missing, or in front
        position = int(generator.integers(len(good)))
        change = bytes([good[position] ^ int(generator.integers(1, 256))])
        mutant = (good[:position] + change + good[position + 1 :], good[:position], good[position:])[i % 3]
        (folder / f"mutant{i:04d}.png").write_bytes(mutant)
    (folder / "broken_link.png").symlink_to(folder / "gone.png")
    os.mkfifo(folder / "pipe.png")  # which would never end, like the device
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "._alpha.png").write_bytes(b"AppleDouble")
    (folder / "folder.png").mkdir()
    result = prepare(folder, tmp_path, on_bad_image="skip")
    reported = [json.loads(line) for line in (result.directory / builder.BAD_IMAGES).read_text().splitlines()]
    names = {entry["path"] for entry in reported}
    assert len(reported) == result.bad == len(names)
    assert sum(result.images.values()) + len(names) == len(odd) + len(bad) + 1000 + 3
    assert names >= {*bad, "broken_link.png", "pipe.png", "device.png"}
    assert not names & {*odd}
    assert all(entry["reason"] and "0x" not in entry["reason"] for entry in reported)
    for split, members in folder_layout(folder).splits.items():
        kept = [image.name for image in members if image.name not in names]
        for name, pixels in zip(kept, reading.read_images(result.directory, split), strict=True):
            expected = {"grey.png": 99, "grey16.png": 99, "bits.png": 255}.get(name, (10, 200, 30))
            if name in odd:
                assert np.abs(pixels.astype(int) - expected).max() <= 3, name


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP"]), edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8))))
def test_whatever_the_bytes_there_is_an_image_or_a_reason(kind, edits):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)), kind)
    for place, written in edits:
        at = int(place * len(data))
        data = data[:at] + written + data[at + max(len(written), 3) :]

    class Memory(NamedTuple):
        data: bytes

        def read(self) -> bytes:
            return self.data

        def stamp(self) -> tuple[int, ...]:
            return ()

    result = convert(Memory(data), SQUARE)
    assert bool(result.png) != bool(result.failure)
    if result.png:
        with Image.open(io.BytesIO(result.png)) as image:
            assert (image.size, image.mode) == ((RESOLUTION, RESOLUTION), "RGB")
            image.load()
    else:
        assert "\n" not in result.failure
