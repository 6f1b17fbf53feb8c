import json
import math
import pathlib

import numpy as np
import pytest
from PIL import Image

from facevae_jax.data import celeba_layout, ffhq_layout, layouts
from facevae_jax.data.images import Task, convert
from facevae_jax.errors import UserError

PINNED_VALIDATION = ["1003.png", "1005.png", "1007.png", "1022.png"]  # blake2b of the name, as a fraction, below 0.1
SHARED = pathlib.Path(__file__).parent.parent.parent / "shared" / "data"
needs_ffhq = pytest.mark.skipif(not (SHARED / "ffhq").is_dir(), reason="../shared/data/ffhq is missing")


def save(path: pathlib.Path, *, size: tuple[int, int] = (8, 8), colour: tuple[int, ...] = (200, 100, 50)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def names(layout: layouts.Layout) -> dict[str, list[str]]:
    return {split: [image.name for image in images] for split, images in layout.splits.items()}


def face(**changes: object) -> list[dict]:
    attributes = {
        "smile": 0.25,
        "headPose": {"pitch": -5.0, "roll": -1.5, "yaw": 4.5},
        "gender": "female",
        "age": 38.0,
        "facialHair": {"moustache": 0.1, "beard": 0.2, "sideburns": 0.3},
        "glasses": "Sunglasses",
        "emotion": dict.fromkeys(ffhq_layout.EMOTIONS, 0.0) | {"surprise": 0.75},
        "makeup": {"eyeMakeup": True, "lipMakeup": False},
        "hair": {"bald": 0.5, "invisible": False, "hairColor": [{"color": "red", "confidence": 0.875}]},
    }
    return [{"faceAttributes": attributes | changes}]


def write_json(path: pathlib.Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def celeba(root: pathlib.Path, *, images: int = 3) -> pathlib.Path:
    files = [f"{i:06d}.jpg" for i in range(1, images + 1)]
    for i, file in enumerate(files):
        save(root / "img_align_celeba" / file, size=(178, 218), colour=(i, i, i))
    labels = ["1 -1", "-1  1", "-1 -1"]
    (root / "list_attr_celeba.txt").write_text(
        f"{images}\nSmiling Young \n" + "".join(f"{f}  {labels[i % 3]}\n" for i, f in enumerate(files))
    )
    (root / "list_eval_partition.txt").write_text("".join(f"{f} {i % 3}\n" for i, f in enumerate(files)))
    return root


def test_ffhq_splits_at_60000_whether_in_folders_or_not(tmp_path):
    for name in ("00000/00011.png", "59000/59999.png", "60000/60000.png", "69999.png"):
        save(tmp_path / "ffhq" / "thumbnails128x128" / name)
    expected = {
        "train": ["thumbnails128x128/00000/00011.png", "thumbnails128x128/59000/59999.png"],
        "validation": ["thumbnails128x128/60000/60000.png", "thumbnails128x128/69999.png"],
    }
    assert names(ffhq_layout.ffhq(tmp_path / "ffhq", resolution=64)) == expected
    assert names(ffhq_layout.ffhq(tmp_path / "ffhq" / "thumbnails128x128", resolution=64)) == expected


@pytest.mark.parametrize(("resolution", "folder"), [(128, "thumbnails128x128"), (256, "images1024x1024")])
def test_ffhq_takes_thumbnails_up_to_128_pixels(tmp_path, resolution, folder):
    save(tmp_path / "thumbnails128x128" / "00000.png")
    save(tmp_path / "images1024x1024" / "00000.png")
    assert names(ffhq_layout.ffhq(tmp_path, resolution=resolution)) == {"train": [f"{folder}/00000.png"]}


@pytest.mark.parametrize("name", ["70000.png", "portrait.png"])
def test_ffhq_refuses_other_numbers(tmp_path, name):
    save(tmp_path / "thumbnails128x128" / name)
    with pytest.raises(UserError, match=rf"{name} is not an FFHQ file name.*--layout=folder"):
        ffhq_layout.ffhq(tmp_path, resolution=64)


def test_ffhq_attributes_by_hand():
    found = ffhq_layout.ffhq_attributes(json.dumps(face()).encode(), name="a.json")
    values = dict(zip([a.name for a in ffhq_layout.ATTRIBUTES], found, strict=True))
    expected = {"age": 38.0, "smile": 0.25, "male": 0.0, "glasses": 1.0, "head_pitch": -5.0, "head_roll": -1.5}
    expected |= {"head_yaw": 4.5, "moustache": 0.1, "beard": 0.2, "sideburns": 0.3, "bald": 0.5, "eye_makeup": 1.0}
    expected |= {"lip_makeup": 0.0, "emotion_surprise": 0.75, "emotion_anger": 0.0, "hair_red": 0.875, "hair_gray": 0.0}
    assert {name: values[name] for name in expected} == expected


def test_ffhq_unknown_attributes_are_nan(tmp_path):
    for number in (1, 2):
        save(tmp_path / "thumbnails128x128" / f"0000{number}.png")
    write_json(tmp_path / "ffhq-features-dataset" / "json" / "00002.json", [])
    for image in ffhq_layout.ffhq(tmp_path, resolution=64).splits["train"]:  # of one the file is missing
        assert np.isnan(image.attributes).all()
    hat = face(hair={"bald": 0.0, "invisible": True, "hairColor": []})
    values = ffhq_layout.ffhq_attributes(json.dumps(hat).encode(), name="hat.json")
    unknown = {a.name for a, v in zip(ffhq_layout.ATTRIBUTES, values, strict=True) if math.isnan(v)}
    assert unknown == {f"hair_{colour}" for colour in ffhq_layout.HAIR_COLOURS}


@pytest.mark.parametrize("content", ["{", '["a"]', '[{"faceAttributes": {"age": "old"}}]'])
def test_ffhq_damaged_attributes_are_named(tmp_path, content):
    save(tmp_path / "thumbnails128x128" / "00007.png")
    write_json(tmp_path / "ffhq-features-dataset" / "00007.json", None)
    (tmp_path / "ffhq-features-dataset" / "00007.json").write_text(content)
    with pytest.raises(UserError, match=r"00007\.json is not a file of the ffhq-features-dataset"):
        ffhq_layout.ffhq(tmp_path, resolution=64)


def test_ffhq_attributes_are_found_or_given_or_absent(tmp_path):
    save(tmp_path / "ffhq" / "thumbnails128x128" / "00011.png")
    assert ffhq_layout.ffhq(tmp_path / "ffhq", resolution=64).attributes == ()
    write_json(tmp_path / "labels" / "json" / "00011.json", face())
    given = ffhq_layout.ffhq(tmp_path / "ffhq", resolution=64, attributes=tmp_path / "labels")
    (tmp_path / "labels").rename(tmp_path / "ffhq" / "ffhq-features-dataset")
    for layout in (given, ffhq_layout.ffhq(tmp_path / "ffhq", resolution=64)):
        assert layout.splits["train"][0].attributes[0] == 38.0
    with pytest.raises(UserError, match=r"--attributes=.*expected the ffhq-features-dataset"):
        ffhq_layout.ffhq(tmp_path / "ffhq", resolution=64, attributes=tmp_path / "ffhq" / "thumbnails128x128")


@needs_ffhq
def test_the_real_ffhq_files():
    layout = ffhq_layout.ffhq(SHARED / "ffhq", resolution=128)
    images = {image.name: image for image in layout.splits["train"]}
    assert len(images) == 113
    known = dict(
        zip(
            [a.name for a in layout.attributes],
            images["thumbnails128x128/00000/00011.png"].attributes,
            strict=True,
        )
    )
    assert [known[name] for name in ("age", "male", "glasses", "hair_brown")] == pytest.approx([38.0, 1.0, 0.0, 0.88])
    assert math.isnan(images["thumbnails128x128/00000/00036.png"].attributes[0])


def test_celeba_partition_and_labels(tmp_path):
    layout = celeba_layout.celeba(celeba(tmp_path))
    assert names(layout) == {
        "train": ["img_align_celeba/000001.jpg"],
        "validation": ["img_align_celeba/000002.jpg"],
        "test": ["img_align_celeba/000003.jpg"],
    }
    assert layout.attributes == (layouts.Attribute("Smiling", "binary"), layouts.Attribute("Young", "binary"))
    assert [layout.splits[s][0].attributes for s in layout.splits] == [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]


def test_celeba_crop_is_148_pixels_from_15_35(tmp_path):
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[35:183, 15:163] = (10, 200, 30)  # exactly what must remain
    Image.fromarray(pixels).save(tmp_path / "a.png")
    result = convert(tmp_path / "a.png", Task(layouts.CELEBA_CROP, 128))
    assert not result.failure
    (tmp_path / "b.png").write_bytes(result.png)
    assert (np.asarray(Image.open(tmp_path / "b.png")) == (10, 200, 30)).all()
    save(tmp_path / "c.png", size=(178, 217))
    assert convert(tmp_path / "c.png", Task(layouts.CELEBA_CROP, 64)).failure == (
        "178x217 pixels where 178x218 are expected"
    )


def test_celeba_of_kaggle(tmp_path):
    celeba(tmp_path)
    expected = celeba_layout.celeba(tmp_path)
    nested = tmp_path / "img_align_celeba" / "img_align_celeba"
    (tmp_path / "img_align_celeba").rename(tmp_path / "inner")
    nested.parent.mkdir()
    (tmp_path / "inner").rename(nested)
    attributes = "image_id,Smiling,Young\n000001.jpg,1,-1\n000002.jpg,-1,1\n000003.jpg,-1,-1\n"
    (tmp_path / "list_attr_celeba.csv").write_text(attributes)
    (tmp_path / "list_attr_celeba.txt").unlink()
    partition = "image_id,partition\n000001.jpg,0\n000002.jpg,1\n000003.jpg,2\n"
    (tmp_path / "list_eval_partition.csv").write_text(partition)
    (tmp_path / "list_eval_partition.txt").unlink()
    found = celeba_layout.celeba(tmp_path)
    assert found.attributes == expected.attributes
    for split in expected.splits:
        assert [i.attributes for i in found.splits[split]] == [i.attributes for i in expected.splits[split]]


@pytest.mark.parametrize("table", ["list_attr_celeba.txt", "list_eval_partition.txt"])
def test_celeba_without_a_list(tmp_path, table):
    (celeba(tmp_path) / table).unlink()
    with pytest.raises(UserError, match=rf"expected {table}, found: img_align_celeba/.*put CelebA's {table} there"):
        celeba_layout.celeba(tmp_path)


def test_celeba_lists_that_do_not_fit(tmp_path):
    root = celeba(tmp_path)
    save(root / "img_align_celeba" / "000009.jpg", size=(178, 218))
    with pytest.raises(UserError, match=r"1 of 4 images are not in list_attr_celeba \(000009.jpg\)"):
        celeba_layout.celeba(root)
    (root / "img_align_celeba" / "000009.jpg").unlink()
    (root / "img_align_celeba" / "000002.jpg").unlink()
    layout = celeba_layout.celeba(root)
    assert list(layout.splits) == ["train", "test"]
    assert "1 of the 3 images" in layout.notes[0]
    (root / "list_eval_partition.txt").write_text("000001.jpg 0\n000003.jpg 7\n")
    with pytest.raises(UserError, match=r"the entry 2, '000003.jpg'"):
        celeba_layout.celeba(root)
    (root / "list_eval_partition.txt").write_text("000001.jpg 0\n000003.jpg 2\n")
    (root / "list_attr_celeba.txt").unlink()
    (root / "list_attr_celeba.csv").touch()
    with pytest.raises(UserError, match="2 of 2 images are not in list_attr_celeba"):
        celeba_layout.celeba(root)


def test_folder_finds_images_only(tmp_path):
    for name in ("b/x.JPG", "a.png", "b/c/y.webp", ".hidden/z.png", "b/._x.jpg", ".DS.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "b" / "c" / "up").symlink_to(tmp_path)  # must not be walked for ever
    found = names(layouts.folder(tmp_path))
    assert sorted(found["train"] + found["validation"]) == ["a.png", "b/c/y.webp", "b/x.JPG"]


def test_hash_split_is_a_tenth_and_depends_on_names_only():
    given = [f"{i}.png" for i in range(2000)]
    validates = layouts.validation_by_hash(given)
    assert 150 < validates.sum() < 250
    np.testing.assert_array_equal(layouts.validation_by_hash(reversed(given)), validates[::-1])
    # Pinned: a change of the rule would move images between the splits of datasets that people have.
    assert sorted(np.array(given)[validates])[:4] == PINNED_VALIDATION


@pytest.mark.parametrize("count", range(1, 8))
def test_hash_split_leaves_no_split_empty(count):
    for series in range(20):
        validates = layouts.validation_by_hash(f"{series}/{i}.png" for i in range(count))
        assert not validates.all()
        assert validates.any() == (count > 1)


def test_wrong_folders_are_explained_in_one_line(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    faces = celeba(tmp_path / "faces")
    cases = {
        "does not exist; .*found: empty/, faces/ .2 entries.": lambda: layouts.folder(tmp_path / "missing" / "deep"),
        "found: nothing .0 entries.": lambda: layouts.folder(empty),
        "cannot be read .*: give a folder, a .zip or an uncompressed .tar": lambda: layouts.folder(
            faces / "list_attr_celeba.txt"
        ),
        "expected thumbnails128x128/ or images1024x1024/, found: .*--layout=celeba --source=": lambda: ffhq_layout.ffhq(
            faces, resolution=64
        ),
        "expected img_align_celeba/, found: .*--layout=folder --source=": lambda: celeba_layout.celeba(
            faces / "img_align_celeba"
        ),
    }
    for pattern, open_layout in cases.items():
        with pytest.raises(UserError, match=pattern) as caught:
            open_layout()
        assert "\n" not in str(caught.value)
    assert "--layout=celeba" in layouts.folder(faces).notes[1]
