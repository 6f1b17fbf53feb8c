"""Drawn and prepared faces have the same members, and nothing is opened before it is needed."""

import numpy as np
import pytest

from facevae_jax.config import DataConfig
from facevae_jax.core.errors import UserError
from facevae_jax.data.dataset import VALIDATION_START, open_dataset
from facevae_jax.data.drawn import synthetic
from facevae_jax.data.layouts.types import Attribute, Layout, SourceImage
from facevae_jax.data.prepared import builder
from facevae_jax.data.sources.images import encode_png

FACES = synthetic.faces(np.arange(6), resolution=32)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("drawn"))
    config = DataConfig(data_dir=data_dir, resolution=32, synthetic_train_images=300, synthetic_validation_images=3)
    return open_dataset(config)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """`toy` with 3 training images, 1 validation image and 2 test images."""
    folder, images = tmp_path_factory.mktemp("prepared"), []
    for number, face in enumerate(FACES):
        (folder / f"{number}.png").write_bytes(encode_png(face))
        images.append(SourceImage(f"{number}.png", folder / f"{number}.png", (number / 2,)))
    splits = {"train": images[:3], "validation": images[3:4], "test": images[4:]}
    layout = Layout(kind="folder", source="faces", splits=splits, attributes=(Attribute("age", "continuous"),))
    builder.prepare_dataset(layout, data_dir=folder / "data", name="toy", resolution=32, workers=1)
    return open_dataset(DataConfig(name="toy", resolution=32, data_dir=str(folder / "data")))


def test_drawn_splits_are_disjoint(drawn):
    assert drawn.sizes == {"train": 300, "validation": 3}
    validation = VALIDATION_START + np.arange(3)
    np.testing.assert_array_equal(drawn.images("train")[257:259], synthetic.faces(np.array([257, 258]), resolution=32))
    np.testing.assert_array_equal(drawn.images("validation"), synthetic.faces(validation, resolution=32))
    table = drawn.labels("validation")
    assert table.attributes == drawn.attributes
    assert Attribute("glasses", "binary") in table.attributes
    np.testing.assert_array_equal(table.column("smile"), synthetic.attributes(validation)["smile"])
    assert drawn.names("validation") == ("validation_0", "validation_1", "validation_2")


def test_drawn_faces_of_a_run_in_a_bucket_are_in_the_cache(tmp_path):
    sizes = {"synthetic_train_images": 2, "synthetic_validation_images": 1}
    config = DataConfig(data_dir="gs://bucket/data", cache_dir=str(tmp_path), resolution=32, **sizes)
    assert open_dataset(config).images("train").shape == (2, 32, 32, 3)
    assert list(tmp_path.glob("synthetic/32/*/train-2.npy"))


@pytest.mark.parametrize(("count", "split"), [(9, "train"), (10, "validation")])
def test_few_validation_images_choose_no_checkpoint(count, split):
    config = DataConfig(synthetic_validation_images=count)
    assert open_dataset(config).evaluation_split == split


def test_prepared_splits(prepared):
    assert prepared.sizes == {"train": 3, "validation": 1, "test": 2}
    np.testing.assert_array_equal(prepared.images("test"), FACES[4:])
    assert prepared.names("test") == ("4.png", "5.png")
    assert prepared.labels("test").attributes == prepared.attributes == (Attribute("age", "continuous"),)
    np.testing.assert_array_equal(prepared.labels("test").column("age"), [2, 2.5])
    with pytest.raises(UserError, match="'smile'"):
        prepared.labels("test").column("smile")
    described = dict(prepared.describe())
    assert described["Images"] == "3 train, 1 validation, 2 test"
    assert described["Attributes"] == "age"


@pytest.mark.parametrize("kind", ["drawn", "prepared"])
def test_rows_and_splits_that_are_not_there_are_named(kind, request):
    dataset = request.getfixturevalue(kind)
    np.testing.assert_array_equal(dataset.read_rows("train", [2, 0]), dataset.images("train")[[2, 0]])
    for row in (-1, dataset.sizes["train"]):
        with pytest.raises(UserError, match=f"rows={row}: .*'train'"):
            dataset.read_rows("train", [0, row])
    for member in (dataset.images, dataset.labels, dataset.names):
        with pytest.raises(UserError, match=r"split='extra'.*train and validation"):
            member("extra")


def test_the_fingerprint_changes_with_the_content(drawn, prepared):
    same = DataConfig(synthetic_train_images=300, synthetic_validation_images=3)
    assert open_dataset(same).fingerprint == drawn.fingerprint
    assert open_dataset(DataConfig()).fingerprint != drawn.fingerprint
    assert prepared.fingerprint == (prepared.directory / "checksums.json").read_text()


def test_nothing_is_opened_before_it_is_needed(tmp_path):
    dataset = open_dataset(DataConfig(name="mine", data_dir=str(tmp_path)))
    with pytest.raises(UserError, match=r"config\.data\.name='mine'"):
        dataset.labels("train")
    ((_, value),) = dataset.describe()
    assert "'mine'" in value
