import functools
import itertools
import json
import math
import pathlib

import numpy as np
import pytest
from PIL import Image

from facevae_jax.core.errors import UserError
from facevae_jax.data.layouts import celeba, ffhq, types
from facevae_jax.data.layouts.folder import folder_layout
from facevae_jax.data.layouts.splits import validation_by_hash
from facevae_jax.data.sources.images import CELEBA_CROP, Task, convert
from tests.test_images import pixels


def save(path: pathlib.Path, *, size: tuple[int, int] = (8, 8), color: tuple[int, ...] = (200, 100, 50)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def names(layout: types.Layout) -> dict[str, list[str]]:
    return {split: [image.name for image in images] for split, images in layout.splits.items()}


def face(**changes: object) -> list[dict]:
    attributes = {
        "smile": 0.25,
        "headPose": {"pitch": -5.0, "roll": -1.5, "yaw": 4.5},
        "gender": "female",
        "age": 38.0,
        "facialHair": {"moustache": 0.1, "beard": 0.2, "sideburns": 0.3},
        "glasses": "Sunglasses",
        "emotion": dict.fromkeys(ffhq.EMOTIONS, 0.0) | {"surprise": 0.75},
        "makeup": {"eyeMakeup": True, "lipMakeup": False},
        "hair": {"bald": 0.5, "invisible": False, "hairColor": [{"color": "red", "confidence": 0.875}]},
    }
    return [{"faceAttributes": attributes | changes}]


def write_json(path: pathlib.Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def celeba_tree(root: pathlib.Path, *, images: int = 3) -> pathlib.Path:
    files = [f"{i:06d}.jpg" for i in range(1, images + 1)]
    for i, file in enumerate(files):
        save(root / "img_align_celeba" / file, size=(178, 218), color=(i, i, i))
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
    for folder in (tmp_path / "ffhq", tmp_path / "ffhq" / "thumbnails128x128"):
        assert names(ffhq.ffhq_layout(folder, resolution=64)) == expected


@pytest.mark.parametrize(("resolution", "folder"), [(128, "thumbnails128x128"), (256, "images1024x1024")])
def test_ffhq_takes_thumbnails_up_to_128_pixels(tmp_path, resolution, folder):
    save(tmp_path / "thumbnails128x128" / "00000.png")
    save(tmp_path / "images1024x1024" / "00000.png")
    assert names(ffhq.ffhq_layout(tmp_path, resolution=resolution)) == {"train": [f"{folder}/00000.png"]}


@pytest.mark.parametrize("name", ["70000.png", "portrait.png"])
def test_ffhq_refuses_other_numbers(tmp_path, name):
    save(tmp_path / "thumbnails128x128" / name)
    with pytest.raises(UserError, match=rf"{name} is not an FFHQ file name.*layout=folder"):
        ffhq.ffhq_layout(tmp_path, resolution=64)


def test_ffhq_attributes_by_hand():
    found = ffhq.ffhq_attributes(json.dumps(face()).encode(), name="a.json")
    values = dict(zip([a.name for a in ffhq.ATTRIBUTES], found, strict=True))
    expected = {"age": 38.0, "smile": 0.25, "male": 0.0, "glasses": 1.0, "head_pitch": -5.0, "head_roll": -1.5}
    expected |= {"head_yaw": 4.5, "moustache": 0.1, "beard": 0.2, "sideburns": 0.3, "bald": 0.5, "eye_makeup": 1.0}
    expected |= {"lip_makeup": 0.0, "emotion_surprise": 0.75, "emotion_anger": 0.0, "hair_red": 0.875, "hair_gray": 0.0}
    assert {name: values[name] for name in expected} == expected


def test_ffhq_unknown_attributes_are_nan(tmp_path):
    for number in (1, 2):
        save(tmp_path / "thumbnails128x128" / f"0000{number}.png")
    write_json(tmp_path / "ffhq-features-dataset" / "json" / "00002.json", [])
    for image in ffhq.ffhq_layout(tmp_path, resolution=64).splits["train"]:  # of one the file is missing
        assert np.isnan(image.attributes).all()
    hat = face(hair={"bald": 0.0, "invisible": True, "hairColor": []})
    values = ffhq.ffhq_attributes(json.dumps(hat).encode(), name="hat.json")
    unknown = {a.name for a, v in zip(ffhq.ATTRIBUTES, values, strict=True) if math.isnan(v)}
    assert unknown == {f"hair_{color}" for color in ffhq.HAIR_COLORS}


@pytest.mark.parametrize("content", ["{", '["a"]', '[{"faceAttributes": {"age": "old"}}]'])
def test_ffhq_damaged_attributes_are_named(tmp_path, content):
    save(tmp_path / "thumbnails128x128" / "00007.png")
    write_json(tmp_path / "ffhq-features-dataset" / "00007.json", None)
    (tmp_path / "ffhq-features-dataset" / "00007.json").write_text(content)
    with pytest.raises(UserError, match=r"00007\.json is not a file of the ffhq-features-dataset"):
        ffhq.ffhq_layout(tmp_path, resolution=64)


def test_ffhq_attributes_are_found_or_given_or_absent(tmp_path):
    save(tmp_path / "ffhq" / "thumbnails128x128" / "00011.png")
    assert ffhq.ffhq_layout(tmp_path / "ffhq", resolution=64).attributes == ()
    write_json(tmp_path / "labels" / "json" / "00011.json", face())
    given = ffhq.ffhq_layout(tmp_path / "ffhq", resolution=64, attributes=tmp_path / "labels")
    (tmp_path / "labels").rename(tmp_path / "ffhq" / "ffhq-features-dataset")
    for layout in (given, ffhq.ffhq_layout(tmp_path / "ffhq", resolution=64)):
        assert layout.splits["train"][0].attributes[0] == 38.0
    with pytest.raises(UserError, match=r"attributes=.*expected the ffhq-features-dataset"):
        ffhq.ffhq_layout(tmp_path / "ffhq", resolution=64, attributes=tmp_path / "ffhq" / "thumbnails128x128")


def test_celeba_partition_and_labels(tmp_path):
    layout = celeba.celeba_layout(celeba_tree(tmp_path))
    assert names(layout) == {
        "train": ["img_align_celeba/000001.jpg"],
        "validation": ["img_align_celeba/000002.jpg"],
        "test": ["img_align_celeba/000003.jpg"],
    }
    assert layout.attributes == (types.Attribute("Smiling", "binary"), types.Attribute("Young", "binary"))
    assert [layout.splits[s][0].attributes for s in layout.splits] == [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]


def test_celeba_crop_is_148_pixels_from_15_35(tmp_path):
    image = np.zeros((218, 178, 3), np.uint8)
    image[35:183, 15:163] = (10, 200, 30)  # exactly what must remain
    Image.fromarray(image).save(tmp_path / "a.png")
    assert (pixels(convert(tmp_path / "a.png", Task(CELEBA_CROP, 128))) == (10, 200, 30)).all()
    save(tmp_path / "c.png", size=(178, 217))
    assert "178x217" in convert(tmp_path / "c.png", Task(CELEBA_CROP, 64)).failure


def test_celeba_of_kaggle(tmp_path):
    celeba_tree(tmp_path)
    expected = celeba.celeba_layout(tmp_path)
    (tmp_path / "img_align_celeba").rename(tmp_path / "inner")
    (tmp_path / "img_align_celeba").mkdir()
    (tmp_path / "inner").rename(tmp_path / "img_align_celeba" / "img_align_celeba")
    attributes = "image_id,Smiling,Young\n000001.jpg,1,-1\n000002.jpg,-1,1\n000003.jpg,-1,-1\n"
    partition = "image_id,partition\n000001.jpg,0\n000002.jpg,1\n000003.jpg,2\n"
    for table, text in (("list_attr_celeba", attributes), ("list_eval_partition", partition)):
        (tmp_path / f"{table}.txt").unlink()
        (tmp_path / f"{table}.csv").write_text(text)
    found = celeba.celeba_layout(tmp_path)
    assert found.attributes == expected.attributes
    for split in expected.splits:
        assert [i.attributes for i in found.splits[split]] == [i.attributes for i in expected.splits[split]]


@pytest.mark.parametrize("table", ["list_attr_celeba.txt", "list_eval_partition.txt"])
def test_celeba_without_a_list(tmp_path, table):
    (celeba_tree(tmp_path) / table).unlink()
    with pytest.raises(UserError, match=rf"expected {table}, found: img_align_celeba/.*put CelebA's {table} there"):
        celeba.celeba_layout(tmp_path)


def test_celeba_lists_that_do_not_fit(tmp_path):
    root = celeba_tree(tmp_path)
    save(root / "img_align_celeba" / "000009.jpg", size=(178, 218))
    with pytest.raises(UserError, match=r"1 of 4 images are not in list_attr_celeba \(000009.jpg\)"):
        celeba.celeba_layout(root)
    (root / "img_align_celeba" / "000009.jpg").unlink()
    (root / "img_align_celeba" / "000002.jpg").unlink()
    layout = celeba.celeba_layout(root)
    assert list(layout.splits) == ["train", "test"]
    assert "1 of the 3 images" in layout.notes[0]
    (root / "list_eval_partition.txt").write_text("000001.jpg 0\n000003.jpg 7\n")
    with pytest.raises(UserError, match=r"the entry 2, '000003.jpg'"):
        celeba.celeba_layout(root)
    (root / "list_eval_partition.txt").write_text("000001.jpg 0\n000003.jpg 2\n")
    (root / "list_attr_celeba.txt").unlink()
    (root / "list_attr_celeba.csv").touch()
    with pytest.raises(UserError, match="2 of 2 images are not in list_attr_celeba"):
        celeba.celeba_layout(root)


def test_folder_finds_images_only(tmp_path):
    for name in ("b/x.JPG", "a.png", "b/c/y.webp", ".hidden/z.png", "b/._x.jpg", ".DS.png"):
        save(tmp_path / name)
    (tmp_path / "README").write_text("not an image")
    (tmp_path / "b" / "c" / "up").symlink_to(tmp_path)  # must not be walked for ever
    layout = folder_layout(tmp_path)
    found = names(layout)
    assert sorted(found["train"] + found["validation"]) == ["a.png", "b/c/y.webp", "b/x.JPG"]
    assert layout.notes[0].startswith("3 other files were ignored (2 .png, 1 no extension)")


def test_hash_split_is_a_tenth_and_depends_on_names_only():
    given = [f"{i}.png" for i in range(2000)]
    validates = validation_by_hash(given)
    assert 150 < validates.sum() < 250
    np.testing.assert_array_equal(validation_by_hash(reversed(given)), validates[::-1])
    # Pinned: a change of the rule would move images between the splits of datasets that people have.
    assert sorted(np.array(given)[validates])[:4] == ["1003.png", "1005.png", "1007.png", "1022.png"]


def test_hash_split_leaves_no_split_empty():
    for count, series in itertools.product(range(1, 8), range(20)):
        validates = validation_by_hash(f"{series}/{i}.png" for i in range(count))
        assert not validates.all()
        assert validates.any() == (count > 1)


def test_wrong_folders_are_explained_in_one_line(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    faces = celeba_tree(tmp_path / "faces")
    for open_layout, path, pattern in [
        (folder_layout, tmp_path / "missing" / "deep", "does not exist; .*found: empty/, faces/ .2 entries."),
        (folder_layout, empty, "found: nothing .0 entries."),
        (folder_layout, faces / "list_attr_celeba.txt", "cannot be read .*: give a folder, or a .zip"),
        (functools.partial(ffhq.ffhq_layout, resolution=64), faces, "thumbnails128x128/ .*--layout=celeba --source="),
        (celeba.celeba_layout, faces / "img_align_celeba", "expected img_align_celeba/, found: .*--layout=folder"),
    ]:
        with pytest.raises(UserError, match=pattern):
            open_layout(path)
    assert "--layout=celeba" in folder_layout(faces).notes[1]
