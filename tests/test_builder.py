import filecmp
import io
import pathlib
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from facevae_jax.data import builder, conversion, dataset, layouts, synthetic
from facevae_jax.data.images import Converted, Crop, Task, convert, converting, encode_png
from facevae_jax.data.parallel import map_in_order
from facevae_jax.errors import UserError

RESOLUTION = 32
SQUARE = Task(layouts.CENTRE_SQUARE, RESOLUTION)
ATTRIBUTES = (layouts.Attribute("binary_one", "binary"), layouts.Attribute("age", "continuous"))


def pixels(result: Converted) -> np.ndarray:
    assert not result.failure
    with Image.open(io.BytesIO(result.png)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def gradient(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (RESOLUTION, RESOLUTION, 3), np.uint8)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> layouts.Layout:
    """70 images of exactly the resolution (two reads' worth), whose pixels must therefore arrive unchanged."""
    folder = tmp_path_factory.mktemp("source")
    images = []
    for i in range(70):
        path = folder / f"{i:03d}.png"
        Image.fromarray(gradient(i)).save(path)
        age = layouts.UNKNOWN if i == 3 else i / 2
        images.append(layouts.SourceImage(path.name, path, (float(i % 2), age)))
    splits = {"train": images[:66], "validation": images[66:]}
    return layouts.Layout(kind="folder", source="source", splits=splits, attributes=ATTRIBUTES)


@pytest.fixture(scope="module")
def prepared(layout: layouts.Layout, tmp_path_factory: pytest.TempPathFactory) -> builder.Prepared:
    data_dir = tmp_path_factory.mktemp("prepared")
    return builder.prepare_dataset(layout, data_dir=data_dir, name="toy", resolution=RESOLUTION, workers=1)


def test_rows_are_in_the_order_of_the_layout(prepared):
    directory = prepared.directory
    assert directory.parts[-3:] == ("toy", "32", "1.0.0")
    assert dataset.split_sizes(directory) == prepared.images == {"train": 66, "validation": 4}
    for split, first in (("train", 0), ("validation", 66)):
        images = list(dataset.read_images(directory, split))
        expected = [gradient(first + i) for i in range(len(images))]
        np.testing.assert_array_equal(images, expected)
        assert images[0].dtype == np.uint8


def test_attributes_and_metadata(prepared):
    attributes = dataset.read_attributes(prepared.directory, "train")
    assert list(attributes) == ["binary_one", "age"]
    np.testing.assert_array_equal(attributes["binary_one"], np.arange(66) % 2)
    expected = np.arange(66, dtype=np.float32) / 2
    expected[3] = np.nan
    np.testing.assert_array_equal(attributes["age"], expected)
    assert attributes["age"].dtype == np.float32
    metadata = dataset.read_metadata(prepared.directory)
    assert metadata["attributes"] == [{"name": a.name, "kind": a.kind} for a in ATTRIBUTES]
    assert metadata["source"] == "source"
    assert metadata["crop"] == "centre square"


def test_no_file_mentions_where_it_was_made(prepared, layout):
    above = str(layout.splits["train"][0].file.parent.parent).encode()
    for path in prepared.directory.iterdir():
        assert above not in path.read_bytes(), path
        assert str(prepared.directory.parent).encode() not in path.read_bytes(), path


def test_tfds_opens_the_dataset(prepared):
    import tensorflow_datasets as tfds

    data_dir = prepared.directory.parent.parent.parent
    source = tfds.data_source(f"toy/{RESOLUTION}", split="validation", data_dir=data_dir)
    assert source[1]["name"] == b"067.png"
    np.testing.assert_array_equal(source[1]["image"], gradient(67))
    assert source[1]["attributes"]["age"] == np.float32(33.5)


def test_workers_and_shards_do_not_change_the_rows(layout, prepared, tmp_path, monkeypatch):
    again = builder.prepare_dataset(layout, data_dir=tmp_path, name="toy", resolution=RESOLUTION, workers=2)
    names = sorted(path.name for path in prepared.directory.iterdir())
    assert sorted(path.name for path in again.directory.iterdir()) == names
    assert filecmp.cmpfiles(prepared.directory, again.directory, names, shallow=False) == (names, [], [])

    monkeypatch.setattr(conversion, "SHARD_BYTES", 3 * RESOLUTION**2 * 20)  # 4 shards of at most 20 images
    sharded = builder.prepare_dataset(layout, data_dir=tmp_path, name="sharded", resolution=RESOLUTION, workers=1)
    assert len(list(sharded.directory.glob("sharded-train*"))) == 4
    np.testing.assert_array_equal(
        list(dataset.read_images(sharded.directory, "train")), [gradient(i) for i in range(66)]
    )


def test_bad_images_are_all_named_and_nothing_is_published(layout, tmp_path):
    good = layout.splits["train"][0]
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(good.file.read_bytes()[:-400])
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    files = [good, *(layouts.SourceImage(path.name, path, (0.0, 0.0)) for path in (text, truncated)), good]
    broken = layouts.Layout(kind="folder", source="s", splits={"train": files}, attributes=ATTRIBUTES)
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"2 of 4 .* \(text\.jpg: .*truncated\.png: .*truncated") as caught:
            builder.prepare_dataset(broken, data_dir=tmp_path / "out", name="bad", resolution=32, workers=workers)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no dataset is prepared there"):
        dataset.find_dataset(tmp_path / "out", name="bad", resolution=32)


def test_overwriting_keeps_the_old_dataset_until_the_new_one_is_whole(layout, tmp_path):
    def prepare(images: list[layouts.SourceImage]) -> builder.Prepared:
        part = layouts.Layout(kind="folder", source="s", splits={"train": images})
        return builder.prepare_dataset(part, data_dir=tmp_path, name="toy", resolution=32, workers=1)

    images = [image._replace(attributes=()) for image in layout.splits["train"]]
    first = prepare(images[:2])
    missing = layouts.SourceImage("gone.png", tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"gone\.png"):
        prepare([*images[:3], missing])
    assert len(list(dataset.read_images(first.directory, "train"))) == 2
    assert dataset.read_attributes(first.directory, "train") == {}
    prepare(images[4:7])
    np.testing.assert_array_equal(list(dataset.read_images(first.directory, "train")), [gradient(i) for i in (4, 5, 6)])
    assert [path.name for path in first.directory.parent.iterdir()] == ["1.0.0"]


def test_find_dataset(prepared, tmp_path):
    data_dir = prepared.directory.parent.parent.parent
    assert dataset.find_dataset(data_dir, name="toy", resolution=32) == prepared.directory
    with pytest.raises(UserError, match=r"config\.data\.resolution=64: .* at 32: use --config\.data\.resolution=32"):
        dataset.find_dataset(data_dir, name="toy", resolution=64)
    with pytest.raises(UserError, match=r"config\.data\.name='celeba' .*there are: toy: .*facevae_jax\.prepare"):
        dataset.find_dataset(data_dir, name="celeba", resolution=32)
    with pytest.raises(UserError, match="no dataset is prepared there"):
        dataset.find_dataset(tmp_path / "nowhere", name="toy", resolution=32)


def test_find_dataset_takes_the_newest_whole_version(tmp_path):
    for version in ("1.9.0", "1.10.0"):
        (tmp_path / "toy" / "32" / version).mkdir(parents=True)
        (tmp_path / "toy" / "32" / version / "dataset_info.json").write_text("{}")
    remains = tmp_path / "toy" / "32" / "incomplete.77"
    remains.mkdir()
    (remains / "dataset_info.json").write_text("{}")
    (tmp_path / "toy" / "32" / "2.0.0").mkdir()  # no description: not whole
    assert dataset.find_dataset(tmp_path, name="toy", resolution=32).name == "1.10.0"


def test_damaged_datasets_are_named(prepared, tmp_path):
    import shutil

    copy = tmp_path / "toy" / "32" / "1.0.0"
    shutil.copytree(prepared.directory, copy)
    with pytest.raises(UserError, match="no split 'test': its splits are: train, validation"):
        dataset.read_attributes(copy, "test")
    with pytest.raises(UserError, match="no split 'test'"):
        list(dataset.read_images(copy, "test"))
    next(copy.glob("*train.array_record*")).unlink()
    with pytest.raises(UserError, match="'train' cannot be read"):
        list(dataset.read_images(copy, "train"))
    (copy / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="is not a readable dataset"):
        dataset.split_sizes(copy)


def test_centre_square_crop_by_hand(tmp_path):
    wide = np.zeros((32, 46, 3), np.uint8)
    wide[:, 7:39] = 255  # (46 - 32) // 2 = 7 columns go on either side
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (pixels(convert(tmp_path / "wide.png", SQUARE)) == 255).all()
    Image.fromarray(wide.swapaxes(0, 1)).save(tmp_path / "tall.png")
    assert (pixels(convert(tmp_path / "tall.png", SQUARE)) == 255).all()


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    result = convert(tmp_path / "a.png", SQUARE)
    assert not result.enlarged
    assert np.abs(pixels(result)[4:-4, 4:-4].astype(int) - 127).max() <= 2  # without a filter: all 0 or all 255


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_large_images_are_reduced_first_as_lanczos_alone_would(tmp_path, format):
    """1024 pixels to 32 in two steps: JPEG by scaled decoding, PNG by boxes."""
    face = Image.fromarray(synthetic.faces(np.arange(1), resolution=256)[0]).resize((1024, 1024))
    face.save(tmp_path / "a", format, quality=95)
    with Image.open(tmp_path / "a") as image:
        exact = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.LANCZOS), np.float32)
    difference = pixels(convert(tmp_path / "a", SQUARE)) - exact
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
    buffer = io.BytesIO()
    Image.fromarray(face).save(buffer, "PNG", compress_level=1)
    assert len(encode_png(face)) < 1.3 * len(buffer.getvalue())


def test_files_are_taken_a_few_at_a_time_and_come_in_order(layout):
    taken = []

    def files():
        for image in layout.splits["train"] * 5:
            taken.append(image)
            yield image.file

    with converting(files(), SQUARE, threads=2) as results:
        np.testing.assert_array_equal([pixels(next(results)) for _ in range(3)], [gradient(i) for i in range(3)])
        assert len(taken) < 150  # of 330: memory is flat


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")

    def peak_bytes(images: int) -> int:
        members = [layouts.SourceImage(f"{i}.png", tmp_path / "a.png") for i in range(images)]
        layout = layouts.Layout(kind="folder", source="s", splits={"train": members})
        tracemalloc.start()
        try:
            builder.prepare_dataset(layout, data_dir=tmp_path, name=f"n{images}", resolution=64, workers=2)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_bytes(10)  # imports
    few, many = peak_bytes(200), peak_bytes(800)
    assert many - few < 600 * 64 * 64 * 3 / 4  # all 800 are in one shard


def test_work_in_threads_ends_with_the_first_failure():
    seen = []

    def fail_at_five(number: int) -> int:
        seen.append(number)
        if number == 5:
            raise UserError("five")
        return number * number

    results = map_in_order(fail_at_five, range(1000), threads=3)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(UserError, match="five"):
        next(results)
    assert max(seen) < 20


def test_enlarging_is_told(tmp_path):
    Image.new("RGB", (31, 31)).save(tmp_path / "a.png")
    assert convert(tmp_path / "a.png", SQUARE).enlarged


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("LA", (0, 0), (255, 255, 255)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 257 * 77, (77, 77, 77)),
    ],
)
def test_colour_modes(tmp_path, mode, value, expected):
    Image.new(mode, (32, 32), value).save(tmp_path / "a.png")
    assert (pixels(convert(tmp_path / "a.png", SQUARE)) == expected).all()


def test_palettes_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (32, 32), 1)
    image.putpalette([9, 9, 9, 40, 50, 60])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    result = pixels(convert(tmp_path / "a.png", SQUARE))
    assert tuple(result[0, 0]) == (255, 255, 255)
    assert tuple(result[1, 1]) == (40, 50, 60)


def test_exif_orientation_is_applied(tmp_path):
    image = np.zeros((32, 32, 3), np.uint8)
    image[:8] = 255  # bright at the top
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    result = pixels(convert(tmp_path / "a.png", SQUARE))
    assert (result[-8:] == 255).all()
    assert (result[:24] == 0).all()


def test_decompression_bombs_and_other_formats_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "b.gif")
    assert "cannot identify" in convert(tmp_path / "b.gif", SQUARE).failure
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # Pillow itself would only warn below twice this
    assert "decompression bomb" in convert(tmp_path / "a.png", SQUARE).failure


def test_metadata_of_the_source_does_not_travel(tmp_path):
    image = Image.new("RGB", (32, 32))
    image.save(tmp_path / "a.jpg", icc_profile=b"secret profile", exif=Image.Exif())
    assert b"secret" not in convert(tmp_path / "a.jpg", Task(Crop("centre square"), 32)).png
    assert b"iCCP" not in convert(tmp_path / "a.jpg", SQUARE).png


def test_importing_needs_neither_tensorflow_nor_tfds():
    code = (
        "import sys; sys.modules['tensorflow_datasets'] = None; sys.modules['tensorflow'] = None; "
        "import facevae_jax.data.dataset, facevae_jax.prepare; print('jax' in sys.modules)"
    )
    repository = pathlib.Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, check=False)
    assert result.stdout == "False\n", result.stderr
