import json

import numpy as np
import pytest
from PIL import Image

from facevae_jax.config import DataConfig
from facevae_jax.core.errors import UserError
from facevae_jax.data.dataset import open_dataset
from facevae_jax.data.layouts.folder import folder_layout
from facevae_jax.data.layouts.label_files import join_table, read_table
from facevae_jax.data.layouts.types import Attribute
from facevae_jax.prepare import prepare

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


ROWS = {"a.png": {"age": 20.5, "smiles": True}, "b.png": {"age": None, "smiles": False}, "c.png": {"age": 40}}
LIST = [{"file": name} | row for name, row in ROWS.items()]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(LIST)),
        ("a.json", json.dumps(ROWS)),
        ("a.jsonl", "\n".join(map(json.dumps, LIST)) + "\n"),
        ("a.json", json.dumps(LIST).replace('"file"', '"photo"')),  # the first, where none has a usual name
    ],
)
def test_json_says_the_same(tmp_path, name, text):
    table = read_table(write(tmp_path / name, text))
    assert [attribute[:2] for attribute in table.attributes] == [("age", "continuous"), ("smiles", "binary")]
    assert list(table.rows) == ["a.png", "b.png", "c.png"]
    np.testing.assert_array_equal(table.values, np.array([[20.5, 1], [NAN, 0], [40, NAN]], np.float32))


@pytest.mark.parametrize("names", [("a.png", "b.png", "sub/c.png"), ("a", "./b.png", "c.png"), ("a", "b", "c")])
def test_rows_are_joined_by_path_name_or_stem(faces, tmp_path, names):
    text = "name,age\n" + "".join(f"{name},{i}\n" for i, name in enumerate(names))
    layout = join_table(folder_layout(faces), write(tmp_path / "a.csv", text))
    found = {image.name: image.attributes for images in layout.splits.values() for image in images}
    assert found == {"a.png": (0,), "b.png": (1,), "sub/c.png": (2,)}
    assert layout.attributes == (Attribute("age", "continuous"),)
    assert layout.notes == ()


def test_what_does_not_match_is_reported(faces, tmp_path):
    layout = join_table(folder_layout(faces), write(tmp_path / "a.csv", "file,age\na.png,1\nz.png,2\n"))
    unused, missing = layout.notes
    assert "1 of 2 rows" in unused
    assert "z.png" in unused
    assert "2 of 3 images" in missing
    values = {image.name: image.attributes[0] for images in layout.splits.values() for image in images}
    assert values["a.png"] == 1
    assert np.isnan([values["b.png"], values["sub/c.png"]]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,age\n", "has no rows"),
        ("file,age\nx.png,1\n", "no row fits an image: .*; rows now: x.png; images: "),
        ("file,age\na.png,1\na.png,2\n", "several rows for 'a.png'"),
        ("file,age\na.png\n", "row 2 has 1 fields, the first 2"),
        ("file,age,age\na.png,1,2\n", "two columns have one name"),
        ("file\na.png\n", "has no attributes"),
        ("file,a/b\na.png,1\n", "'a/b' cannot be the name"),
        ("", "has no rows"),
    ],
)
def test_tables_that_cannot_be_used_are_one_line(faces, tmp_path, text, message):
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(UserError, match=message) as caught:
        join_table(folder_layout(faces), path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]]", "3", '["a"]', '{"a": 3}', "[" * 100_000, "[{}]", '[{"file": 3, "x": 1}]'])
def test_damaged_json_is_one_line(tmp_path, text):
    with pytest.raises(UserError, match="cannot be read"):
        read_table(write(tmp_path / "a.json", text))


def test_a_row_for_several_images_and_a_known_attribute_are_refused(faces, tmp_path):
    (faces / "other").mkdir()
    Image.new("RGB", (32, 32)).save(faces / "other" / "c.png")
    path = write(tmp_path / "a.csv", "file,age\nc.png,1\n")
    with pytest.raises(UserError, match=r"the row 'c.png' fits '\w+/c.png' and '\w+/c.png': write paths"):
        join_table(folder_layout(faces), path)
    write(path, "file,age\nother/c.png,1\n")
    joined = join_table(folder_layout(faces), path)
    with pytest.raises(UserError, match="an attribute 'age' already"):
        join_table(joined, path)


def test_free_text_is_left_out_with_a_note(tmp_path):
    text = "file,age,caption\n" + "".join(f"{i}.png,{i},caption {i}\n" for i in range(300))
    table = read_table(write(tmp_path / "a.csv", text))
    assert [attribute.name for attribute in table.attributes] == ["age"]
    assert "'caption'" in table.notes[0]


def test_from_the_command_to_the_table_that_is_read(faces, tmp_path):
    path = write(tmp_path / "a.csv", CSV)
    prepare(layout="folder", source=str(faces), resolution=32, data_dir=str(tmp_path), attributes=str(path))
    config = DataConfig(name="folder", resolution=32, data_dir=str(tmp_path))
    tables = [open_dataset(config).labels(split) for split in ("train", "validation")]
    assert tables[0].attributes == tables[1].attributes == read_table(path).attributes
    ages = np.concatenate([table.column("age") for table in tables])
    assert sorted(ages[~np.isnan(ages)].tolist()) == [20.5, 40]
