"""Labels as people have them: tables of other programs and countries, Parquet files, CelebA's lists."""

import io
import json
import pathlib
import unicodedata

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from facevae_jax.core.command_line import PathsParser
from facevae_jax.core.errors import UserError
from facevae_jax.data.layouts.celeba import celeba_layout
from facevae_jax.data.layouts.folder import folder_layout
from facevae_jax.data.layouts.label_files import join_table, read_table
from facevae_jax.data.layouts.parquet import parquet_layout
from facevae_jax.data.layouts.types import Attribute
from facevae_jax.prepare import next_command, prepare, settings_for
from facevae_jax.trained import labels
from facevae_jax.trained.labels import with_commas
from tests.test_odd_files import NAMES, png, saved

TABLES = {
    "spaces.csv": " file , smile \na.png, 1\nb.png, 0\n",
    "index.csv": ",file,smile\n0,a.png,1\n1,b.png,0\n",
    "pandas.csv": "Unnamed: 0,file,smile\n0,a.png,1\n1,b.png,0\n",
    "trailing.csv": "file,smile,\na.png,1,\nb.png,0,\n",
    "commas.csv": "file,smile\na.png,1,,\nb.png,0,\n",
    "semicolons.csv": "file;smile\na.png;1\nb.png;0\n",
    "tabs.csv": "file\tsmile\na.png\t1\nb.png\t0\n",
    "absolute.csv": "file,smile\n/home/me/faces/a.png,1\n/home/me/faces/b.png,0\n",
    "windows.csv": "file,smile\nC:\\faces\\a.png,1\nC:\\faces\\b.png,0\n",
    "longer.csv": "file,smile\nfaces/a.png,1\nfaces/b.png,0\n",
    "twice.csv": "Unnamed: 0.1,Unnamed: 0,image_path,smile\n0,0,a.png,1\n1,1,b.png,0\n",
    "quotes.csv": 'file , "smile"\na.png, "1"\nb.png, "0"\n',
    "excel.csv": "sep=;\nfile;smile\na.png;1\nb.png;0\n",
    "empty.csv": "file,smile\na.png,1\n,\nb.png,0\n",
    "jpegs.csv": "file,smile\nfaces/a.jpg,1\nfaces/b.jpg,0\n",
    "lines.jsonl": '{"File Name": "a.png", "smile": "yes"}\n{"File Name": "b.png", "smile": "no"}\n',
    "dataset.json": json.dumps({"labels": [["a.png", 1], ["b.png", 0]]}),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_labels_are_read_however_they_were_saved(tmp_path, name, encoding):
    faces = saved(tmp_path / "faces", ["a.png", "b.png", "c.png"])
    (tmp_path / name).write_text(TABLES[name], encoding=encoding)
    joined = join_table(folder_layout(faces), tmp_path / name)
    assert [(attribute.name, attribute.kind) for attribute in joined.attributes] in (
        [("smile", "binary")],
        [("label", "binary")],
    )
    labels = {image.name: image.attributes[0] for found in joined.splits.values() for image in found}
    assert (labels["a.png"], labels["b.png"]) == (1.0, 0.0)
    assert np.isnan(labels["c.png"])


def column(tmp_path, content, images=("a.png", "b.png")):
    """The first attribute that a table gives to images, and its values by name."""
    source = saved(tmp_path / "faces", images)
    (tmp_path / "t.csv").write_text(content)
    joined = join_table(folder_layout(source, labeled=True), tmp_path / "t.csv")
    found = {image.name: image.attributes[0] for images in joined.splits.values() for image in images}
    return joined.attributes[0], found


def test_numbers_of_other_countries_and_names_of_other_columns(tmp_path):
    attribute, found = column(tmp_path / "1", "file;age\na.png;20,5\nb.png;31,25\n")
    assert (attribute.kind, found) == ("continuous", {"a.png": 20.5, "b.png": 31.25})
    attribute, found = column(tmp_path / "2", 'file;"hair, blond, long"\na.png;1\nb.png;0\n')
    assert (attribute.name, found) == ("hair, blond, long", {"a.png": 1.0, "b.png": 0.0})
    attribute, found = column(tmp_path / "3", "name,file\nAnn,a.png\nBo,b.png\n")
    assert (attribute.name, attribute.categories) == ("name", ("Ann", "Bo"))
    attribute, found = column(tmp_path / "6", "id,image_path\n1,a.png\n2,b.png\n")
    assert (attribute.name, found) == ("id", {"a.png": 1.0, "b.png": 2.0})
    attribute, found = column(tmp_path / "4", "file,x\na.png,\u22125%\nb.png,7%\n")
    assert (attribute.kind, found) == ("continuous", {"a.png": -5.0, "b.png": 7.0})
    attribute, found = column(tmp_path / "5", "file,x\na.png,1e40\nb.png,7\n")
    assert attribute.kind == "categorical"


@pytest.mark.parametrize("start", ["/data/faces/", "C:\\faces\\", "faces/", "./"])
def test_paths_of_another_machine_fit_though_folders_share_names(tmp_path, start):
    images = [f"{who}/{number}.png" for who in ("men", "women") for number in range(3)]
    rows = [f"{start}{name},{row}" for row, name in enumerate(images)]
    _, found = column(tmp_path, "file,age\n" + "\n".join(rows).replace("/", "\\" if "\\" in start else "/"), images)
    assert found == {name: float(row) for row, name in enumerate(images)}


def test_labels_join_names_in_either_form_of_unicode(tmp_path):
    faces = saved(tmp_path / "faces", [unicodedata.normalize("NFD", name) for name in NAMES])
    (tmp_path / "a.csv").write_text("file,age\n" + "".join(f"{name},{row}\n" for row, name in enumerate(NAMES)))
    assert not join_table(folder_layout(faces), tmp_path / "a.csv").notes


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"file,smile\n\xe9.png,1\n", "not UTF-8"),
        (b"a.png,1\nb.png,0\n", "first row is of an image"),
        (b"PK\x03\x04 workbook", "Excel workbook"),
        (b"<!DOCTYPE html>", "page of a web site"),
        (b'{"labels": null}', "null"),
        (b'{"labels": [["a.png", [1, 0]]]}', "pairs"),
    ],
)
def test_tables_that_cannot_be_read_say_why(tmp_path, content, expected):
    path = tmp_path / ("a.json" if content.startswith(b"{") else "a.csv")
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        read_table(path)


def parquet(path, count, first=0, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + count)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    image = [{"bytes": png(np.full((40, 40, 3), n, np.uint8)), "path": f"{n}.png"} for n in numbers]
    table = pyarrow.table({"image": pyarrow.array(image, kind)} | columns)
    features = {"label": {"names": ["no", "yes", "maybe"], "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=4)


def test_parquet_files_are_read_with_their_splits_and_labels(tmp_path):
    parquet(tmp_path / "data/train-00000-of-00002.parquet", 6, label=[0, 1, 2, 0, 1, None], age=[1.5] * 6)
    parquet(tmp_path / "data/train-00001-of-00002.parquet", 5, 6, label=[2] * 5, age=[None] * 5)
    parquet(tmp_path / "data/test-00000-of-00001.parquet", 2, 90, label=[1, 1], age=[3.0, 4.0])
    layout = parquet_layout(tmp_path)
    assert {split: len(found) for split, found in layout.splits.items()}["test"] == 2
    assert sum(map(len, layout.splits.values())) == 13
    assert [(a.name, a.kind) for a in layout.attributes] == [("label", "categorical"), ("age", "continuous")]
    for found in layout.splits.values():
        for image in found:
            number = int(pathlib.Path(image.name).stem)
            decoded = np.asarray(Image.open(io.BytesIO(image.file.read())))
            assert (decoded == number).all()
            assert number not in (90, 2, 7) or image.attributes[0] == {90: 1, 2: 2, 7: 2}[number]
            assert np.isnan(image.attributes[0]) == (number == 5)


def test_parquet_files_of_other_writers(tmp_path):
    """No labels; polars' and pandas' types; numbers of two sizes; a column that the first file lacks; other names."""
    parquet(tmp_path / "plain/train.parquet", 6)
    parquet(tmp_path / "plain/celeba-test.PARQUET", 2, 50)
    plain = parquet_layout(tmp_path / "plain")
    assert sum(map(len, plain.splits.values())) == 8
    assert plain.attributes == ()
    assert [image.name for image in plain.splits["test"]] == ["50.png", "51.png"]
    assert all(image.file.read() for found in plain.splits.values() for image in found)
    texts = pyarrow.array(["x", "y", "x", None]).dictionary_encode()
    parquet(tmp_path / "typed/0.parquet", 4, hair=texts, n=pyarrow.array([1, 2, 3, 4], pyarrow.int32()))
    large = pyarrow.array(["y"] * 4, pyarrow.large_string())
    parquet(tmp_path / "typed/1.parquet", 4, 4, hair=large, n=pyarrow.array([5] * 4, pyarrow.int64()), late=[1.5] * 4)
    typed = parquet_layout(tmp_path / "typed")
    assert [(a.name, a.kind) for a in typed.attributes] == [
        ("hair", "categorical"),
        ("n", "continuous"),
        ("late", "continuous"),
    ]
    values = {image.name: image.attributes for found in typed.splits.values() for image in found}
    np.testing.assert_array_equal(values["1.png"], (1.0, 2.0, np.nan))
    np.testing.assert_array_equal(values["6.png"], (1.0, 5.0, 1.5))
    (tmp_path / "lfs").mkdir()
    (tmp_path / "lfs" / "a.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read .a pointer of Git LFS"):
        parquet_layout(tmp_path / "lfs")
    with pytest.raises(UserError, match="does not exist"):
        parquet_layout(tmp_path / "none")


ATTRIBUTES = "2\nSmiling Male\n000001.jpg 1 -1\n000002.jpg -1 1\n"
PARTITION = "000001.jpg 0\n000002.jpg 1\n"
KAGGLE = "image_id,Smiling,Male\n000001.jpg,1,-1\n000002.jpg,-1,1\n", "image_id,partition\n000001.jpg,0\n000002.jpg,1\n"


@pytest.mark.parametrize("kind", ["png folder", "authors' png folder", "notepad", "semicolons", "utf-16", "folders"])
def test_celebas_lists_in_any_form(tmp_path, kind):
    images = {"png folder": "img_align_celeba_png", "authors' png folder": "Img/img_align_celeba_png"}
    where = images.get(kind, "img_align_celeba")
    saved(tmp_path, [f"{where}/000001.png", f"{where}/000002.png"])
    names, contents, encoding = ("list_attr_celeba.txt", "list_eval_partition.txt"), (ATTRIBUTES, PARTITION), "utf-8"
    if kind in ("semicolons", "utf-16", "folders"):
        names, contents = ("list_attr_celeba.csv", "list_eval_partition.csv"), KAGGLE
    if kind == "notepad":
        encoding = "utf-8-sig"
    if kind == "semicolons":
        contents = tuple(text.replace(",", ";") for text in KAGGLE)
    if kind == "utf-16":
        encoding = "utf-16"
    for name, text in zip(names, contents, strict=True):
        path = tmp_path / name / name if kind == "folders" else tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding=encoding)
    layout = celeba_layout(tmp_path)
    assert [layout.splits[split][0].attributes for split in ("train", "validation")] == [(1.0, 0.0), (0.0, 1.0)]


def test_parquet_files_without_images_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"expected \.parquet files"):
        parquet_layout(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column holds images"):
        parquet_layout(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read .*download it again"):
        parquet_layout(tmp_path)


def test_paths_and_attributes_may_have_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("Smith, John.jpg", "a.jpg", "b, c, d.png"):
        pathlib.Path(name).touch()
    parse = PathsParser().parse
    assert parse("Smith, John.jpg") == ["Smith, John.jpg"]
    assert parse("a.jpg,Smith, John.jpg, b, c, d.png") == ["a.jpg", "Smith, John.jpg", "b, c, d.png"]
    assert parse("gone.jpg, a.jpg") == ["gone.jpg", "a.jpg"]
    known = [Attribute(name, "binary") for name in ("smile", "hair, blond", "a,b", "x=y")]
    known.append(Attribute("age", "categorical", ("20, or so", "30=40", "old")))
    assert with_commas(["smile", "hair", "blond"], known) == ["smile", "hair, blond"]
    assert with_commas(["hair", "blond=1", "a", "b=0", "x=y=1"], known) == ["hair, blond=1", "a,b=0", "x=y=1"]
    texts = with_commas(["age=20", "or so", "age=30=40", "smile=1"], known)
    assert texts == ["age=20, or so", "age=30=40", "smile=1"]
    for text, value in zip(texts[:2], (0, 1), strict=True):
        assert labels.parse(known, [text])[-1] == value
    assert labels.parse(known, ["x=y=1"])[3] == 1


@pytest.mark.parametrize("images_", [1, 2, 18, 54, 270, 2_700, 16_000, 60_000, 160_000])
def test_few_images_have_steps_enough(images_):
    settings = {"train.batch_size": 128, "train.epochs": 30} | settings_for(images_, 64)
    assert settings["train.batch_size"] <= max(images_, 1)
    steps = images_ // settings["train.batch_size"] * settings["train.epochs"]
    assert steps >= 3_700
    assert steps <= 4_200 or images_ > 16_000
    assert bool(settings_for(images_, 64)) == (images_ < 16_000)


def test_the_next_command_trains_on_the_dataset_itself(tmp_path):
    """There are configs drawn64 and vdvae_ffhq256, of other data than a dataset of the first part of their names."""
    for name, resolution in (("drawn", 64), ("vdvae_ffhq", 256), ("gdl", 128)):
        command = next_command(str(tmp_path), name=name, resolution=resolution, images=60_000)
        assert f"--config.data.name={name}" in command
    assert "celeba64" in next_command(str(tmp_path), name="celeba", resolution=64, images=160_000)


def test_labels_that_come_later_are_not_passed_over(tmp_path, capsys):
    source = saved(tmp_path / "faces", [f"{number}.png" for number in range(4)])
    (tmp_path / "a.csv").write_text("file,smile\n" + "".join(f"{number}.png,{number % 2}\n" for number in range(4)))
    asked = {"layout": "folder", "resolution": 32, "name": "later", "data_dir": tmp_path / "data"}
    prepare(source, **asked)
    with pytest.raises(UserError, match="was prepared without the labels smile"):
        prepare(source, **asked, attributes=tmp_path / "a.csv")
    prepare(source, **asked, attributes=tmp_path / "a.csv", overwrite=True)
    capsys.readouterr()
    prepare(source, **asked, attributes=tmp_path / "a.csv")
    assert "already prepared" in capsys.readouterr().out


def test_a_validation_split_that_is_left_out_is_told(tmp_path, capsys):
    source = saved(tmp_path / "faces", ["train/a.png", "train/b.png", "val/c.png"])
    (source / "val" / "c.png").write_bytes(b"no image")
    asked = {"layout": "folder", "resolution": 32, "name": "left", "data_dir": tmp_path / "data"}
    prepare(source, **asked, on_bad_image="skip")
    assert "all images for validation were left out" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["added", "removed", "another folder"])
def test_images_that_changed_since_are_not_passed_over(tmp_path, capsys, change):
    source = saved(tmp_path / "a" / "faces", [f"{number}.png" for number in range(6)])
    asked = {"layout": "folder", "resolution": 32, "name": "same", "data_dir": tmp_path / "data"}
    prepare(source, **asked)
    prepare(source, **asked)
    assert "already prepared" in capsys.readouterr().out
    if change == "added":
        saved(source, ["new.png"])
    elif change == "removed":
        (source / "0.png").unlink()
    else:
        source = saved(tmp_path / "b" / "faces", ["x.png", "y.png"])
    with pytest.raises(UserError, match="prepared from other files"):
        prepare(source, **asked)
    prepare(source, **asked, overwrite=True)


def test_a_row_labels_what_it_fits_best_and_nothing_by_accident(tmp_path):
    """Two formats of one name; a dot in a name; a path of another folder; several columns that could be the files'."""
    _, found = column(tmp_path / "1", "file,age\n1.jpg,7\n", ["1.jpg", "1.png"])
    assert found["1.jpg"] == 7
    assert np.isnan(found["1.png"])
    _, found = column(tmp_path / "2", "file,age\nperson.1,7\nb.png,8\n", ["person.png", "b.png"])
    assert np.isnan(found["person.png"])
    _, found = column(tmp_path / "3", "file,age\n/data/a/1.png,7\n", ["a/1.png", "b/1.png"])
    assert found["a/1.png"] == 7
    assert np.isnan(found["b/1.png"])
    _, found = column(tmp_path / "4", "file,age\na/1.png,7\nx.png,8\n", ["b/1.png", "x.png"])
    assert np.isnan(found["b/1.png"])
    attribute, _ = column(tmp_path / "5", "image_id,mask\n1,1_mask.png\n2,2_mask.png\n", ["1.png", "2.png"])
    assert attribute.name == "mask"
    with pytest.raises(UserError, match=r"the row '1\.png' fits '[ab]/1\.png' and '[ab]/1\.png': write paths\."):
        column(tmp_path / "6", "file,age\n1.png,7\n", ["a/1.png", "b/1.png"])


@pytest.mark.parametrize("content", ['["a.png", "b.png"]', '[["a.png", 1]]', '[{"file": "a.png", "x": 1}, {"x": 2}]'])
def test_json_of_other_shapes_is_one_line(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match="cannot be read"):
        read_table(tmp_path / "a.json")
