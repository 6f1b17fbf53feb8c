import json

import numpy as np
import pytest
from PIL import Image

from facevae_jax import prepare
from facevae_jax.config import DataConfig
from facevae_jax.data import layouts, synthetic
from facevae_jax.data.attributes import join_table, read_table
from facevae_jax.data.labels import open_attributes
from facevae_jax.data.layouts import Attribute
from facevae_jax.errors import UserError
from tests.conftest import assert_one_line_error, run_module

CSV = """file,age,smiles,glasses,mood,comment
a.png,20.5,1,yes,happy,
b.png,NA,-1,no,sad,
c.png,40,1,,happy,x
"""
NAN = float("nan")


@pytest.fixture
def faces(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png"):
        path = tmp_path / "faces" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (len(name), 0, 0)).save(path)
    return tmp_path / "faces"


def write(path, text):
    path.write_text(text)
    return path


def test_kinds_and_values_of_columns(tmp_path):
    table = read_table(write(tmp_path / "a.csv", CSV))
    assert table.attributes == (
        Attribute("age", "continuous"),
        Attribute("smiles", "binary"),
        Attribute("glasses", "binary"),
        Attribute("mood", "categorical", ("happy", "sad")),
        Attribute("comment", "categorical", ("x",)),
    )
    expected = [[20.5, 1, 1, 0, NAN], [NAN, 0, 0, 1, NAN], [40, 1, NAN, 0, 0]]
    np.testing.assert_array_equal(table.values, np.array(expected, np.float32))


@pytest.mark.parametrize("form", ["list", "object", "lines", "other column"])
def test_json_says_the_same(tmp_path, form):
    rows = [
        {"file": "a.png", "age": 20.5, "smiles": True},
        {"file": "b.png", "age": None, "smiles": False},
        {"file": "c.png", "age": 40},
    ]
    path = tmp_path / ("a.jsonl" if form == "lines" else "a.json")
    if form == "list":
        path.write_text(json.dumps(rows))
    elif form == "object":
        path.write_text(json.dumps({row.pop("file"): row for row in rows}))
    elif form == "other column":  # the first, where none has a usual name
        path.write_text(json.dumps([{"photo": row.pop("file")} | row for row in rows]))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    table = read_table(path)
    assert [attribute[:2] for attribute in table.attributes] == [("age", "continuous"), ("smiles", "binary")]
    assert list(table.rows) == ["a.png", "b.png", "c.png"]
    np.testing.assert_array_equal(table.values, np.array([[20.5, 1], [NAN, 0], [40, NAN]], np.float32))


@pytest.mark.parametrize("names", [("a.png", "b.png", "sub/c.png"), ("a", "./b.png", "c.png"), ("a", "b", "c")])
def test_rows_are_joined_by_path_name_or_stem(faces, tmp_path, names):
    text = "name,age\n" + "".join(f"{name},{i}\n" for i, name in enumerate(names))
    layout = join_table(layouts.folder(faces), write(tmp_path / "a.csv", text))
    found = {image.name: image.attributes for images in layout.splits.values() for image in images}
    assert found == {"a.png": (0,), "b.png": (1,), "sub/c.png": (2,)}
    assert layout.attributes == (Attribute("age", "continuous"),)
    assert layout.notes == ()


def test_what_does_not_match_is_reported(faces, tmp_path):
    layout = join_table(layouts.folder(faces), write(tmp_path / "a.csv", "file,age\na.png,1\nz.png,2\n"))
    assert layout.notes == (
        "1 of 2 rows of a.csv fit no image (z.png).",
        "2 of 3 images are not in a.csv (b.png, sub/c.png): unknown there.",
    ) or layout.notes[1].startswith("2 of 3 images are not in a.csv (")
    values = {image.name: image.attributes[0] for images in layout.splits.values() for image in images}
    assert values["a.png"] == 1
    assert np.isnan([values["b.png"], values["sub/c.png"]]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,age\n", "has no rows"),
        ("file,age\nx.png,1\n", "no row fits an image; rows: x.png; images: "),
        ("file,age\na.png,1\na.png,2\n", "several rows for 'a.png'"),
        ("file,age\na.png\n", "row 2 has 1 fields, the first 2"),
        ("file,age,age\na.png,1,2\n", "two columns have one name"),
        ("file\na.png\n", "has no attributes"),
        ("file,a/b\na.png,1\n", "'a/b' cannot be the name"),
        ("", "cannot be read"),
        ("ÿÿÿ", "has no rows"),
    ],
)
def test_tables_that_cannot_be_used_are_told_in_one_line(faces, tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        join_table(layouts.folder(faces), write(tmp_path / "a.csv", text))
    assert "--attributes=" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]]", "3", '["a"]', '{"a.png": 3}', "[" * 100_000, "[{}]", '[{"file": 3, "x": 1}]']
)
def test_damaged_json_is_told_in_one_line(tmp_path, text):
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_table(write(tmp_path / "a.json", text))
    assert "\n" not in str(caught.value)


def test_a_row_for_several_images_and_a_known_attribute_are_refused(faces, tmp_path):
    (faces / "other").mkdir()
    Image.new("RGB", (32, 32)).save(faces / "other" / "c.png")
    path = write(tmp_path / "a.csv", "file,age\nc.png,1\n")
    with pytest.raises(UserError, match=r"the row 'c.png' fits '\w+/c.png' and '\w+/c.png': write paths"):
        join_table(layouts.folder(faces), path)
    write(path, "file,age\nother/c.png,1\n")
    joined = join_table(layouts.folder(faces), path)
    with pytest.raises(UserError, match="an attribute 'age' already"):
        join_table(joined, path)


def test_free_text_is_left_out_with_a_note(tmp_path):
    text = "file,age,caption\n" + "".join(f"{i}.png,{i},caption {i}\n" for i in range(300))
    table = read_table(write(tmp_path / "a.csv", text))
    assert [attribute.name for attribute in table.attributes] == ["age"]
    assert table.notes == ("the column 'caption' of a.csv has over 256 different texts: left out.",)


def test_from_the_command_to_the_table_that_is_read(faces, tmp_path):
    path = write(tmp_path / "a.csv", CSV)
    flags = ["--layout=folder", f"--source={faces}", "--resolution=32", f"--data_dir={tmp_path}"]
    result = run_module("facevae_jax.prepare", *flags, f"--attributes={path}")
    assert result.returncode == 0, result.stderr
    config = DataConfig(name="folder", resolution=32, data_dir=str(tmp_path))
    tables = [open_attributes(config, split) for split in ("train", "validation")]
    assert tables[0].attributes == tables[1].attributes == read_table(path).attributes
    ages = np.concatenate([table.column("age") for table in tables])
    assert sorted(ages[~np.isnan(ages)].tolist()) == [20.5, 40]
    with pytest.raises(UserError, match="no attribute 'aeg'; there are: age, smiles, glasses, mood, comment"):
        tables[0].column("aeg")
    missing = run_module("facevae_jax.prepare", *flags, "--overwrite", "--attributes=none.csv")
    assert_one_line_error(missing, "none.csv", "cannot be read (No such file or directory)")


def test_drawn_faces_have_the_same_table():
    config = DataConfig(synthetic_train_images=5, synthetic_validation_images=3)
    table = open_attributes(config, "validation")
    assert table.values.shape == (3, len(synthetic.ATTRIBUTES))
    assert table.attributes[table.attributes.index(Attribute("glasses", "binary"))].kind == "binary"
    expected = synthetic.attributes(np.arange(2**32, 2**32 + 3))
    np.testing.assert_array_equal(table.column("smile"), expected["smile"])
    assert len(open_attributes(config, "train").values) == 5


def test_unprepared_datasets_have_no_table(tmp_path):
    with pytest.raises(UserError, match="is not prepared"):
        open_attributes(DataConfig(name="mine", data_dir=str(tmp_path)), "train")
    assert prepare.is_table("Labels.CSV")
