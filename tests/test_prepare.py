import pathlib

import numpy as np
import pytest
from PIL import Image

from facevae_jax.core.errors import UserError
from facevae_jax.data.prepared import reading
from facevae_jax.prepare import DEFAULT_DATA_DIR, next_command, open_layout, prepare
from tests.conftest import assert_one_line_error, run_module

MODULE = "facevae_jax.prepare"


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("images") / "faces"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (40, 48), (i, 2 * i, 3 * i)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory, faces: pathlib.Path) -> pathlib.Path:
    """A data_dir with `toy`, a dataset as TFDS writes it: truth values, floats, texts and images of any size."""
    tfds = reading.import_tfds()

    class Toy(tfds.core.ShardBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.0.1")
        url_infos = None

        def _info(self):
            features = {"image": tfds.features.Image(), "text": tfds.features.Text(), "depth": np.float32}
            features["attributes"] = {"smiling": np.bool_}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _shard_iterators_per_split(self, dl_manager):
            def examples():
                for i in range(6):
                    image = (faces / f"{i}.png").read_bytes()
                    yield i, {"image": image, "text": "t", "depth": i / 2, "attributes": {"smiling": i > 2}}

            return {"train": [examples], "test": [examples]}

    Toy.name = "toy"
    data_dir = tmp_path_factory.mktemp("catalogue")
    Toy(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


@pytest.mark.slow
def test_command_from_images_to_the_next_command(faces, tmp_path):
    flags = ["--layout=folder", f"--source={faces}", "--resolution=32", f"--data_dir={tmp_path}", "--workers=2"]
    result = run_module(MODULE, *flags)
    assert result.returncode == 0, result.stderr
    prepared, following = result.stdout.splitlines()
    directory = tmp_path / "folder" / "32" / "1.0.0"
    assert prepared.startswith(f"prepared: {directory} (5 train, 1 validation; ")
    given = f"--config.data.name=folder --config.data.resolution=32 --config.data.data_dir={tmp_path}"
    few = "--config.train.batch_size=4 --config.train.epochs=4000 --config.train.evaluate_every_epochs=200"
    few += " --config.objective.likelihood=mse --config.objective.r_loss_factor=25000.0"
    assert following == f"next: python -m facevae_jax.main --config=ffhq64 {given} {few} --workdir=/tmp/folder32"
    colors = {tuple(image[5, 5]) for image in reading.read_images(directory, "train")}
    assert colors < {(i, 2 * i, 3 * i) for i in range(6)}
    assert_one_line_error(run_module(MODULE, "somewhere"), "somewhere", "--source")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *(({"resolution": size}, "resolution=.*from 32 to 1024") for size in (0, -64, 16, 48, 2048)),
        ({"layout": ""}, "layout="),
        ({"layout": "imagenet"}, "layout='imagenet'.*ffhq, celeba, folder, parquet, tfds"),
        ({"source": ""}, "source is missing"),
        ({"source": "/nowhere/at/all"}, "/nowhere/at/all.*does not exist"),
        ({"data_dir": __file__}, "data_dir="),
        ({"name": "../up"}, "name='../up'"),
        ({"name": "synthetic"}, "name='synthetic'"),
        ({"workers": 0}, "workers=0"),
        *(({"crop": crop}, f"crop='{crop}'") for crop in ("1,2,3", "0,0,10,12", "9,9,5,5", "-1,0,9,10", "0,0,0,0")),
        ({"crop": "100,0,150,50"}, "150, 50"),  # no image is so large
        ({"resize": "nearest"}, "resize='nearest'.*lanczos, bilinear"),
        ({"attributes": "x"}, "attributes='x': give a file .csv, .json or .jsonl"),
    ],
)
def test_impossible_flags(flags, message, faces, tmp_path):
    given = {"layout": "folder", "source": str(faces), "resolution": 32, "data_dir": str(tmp_path)}
    with pytest.raises(UserError, match=message):
        prepare(**(given | flags))


def test_another_crop_and_filter(tmp_path):
    """The pixels are Pillow's of that square and filter; a dataset of another crop is not taken for it."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (218, 178, 3), np.uint8))
    (tmp_path / "people").mkdir()
    image.save(tmp_path / "people" / "a.png")
    flags = {"layout": "folder", "source": str(tmp_path / "people"), "resolution": 64, "data_dir": str(tmp_path)}
    directory = prepare(**flags, crop="15,40,163,188", resize="bilinear")
    (made,) = (image for split in reading.split_sizes(directory) for image in reading.read_images(directory, split))
    expected = image.crop((15, 40, 163, 188)).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(made, expected)
    assert reading.read_metadata(directory)["resize"] == "Pillow bilinear, antialiased"
    prepare(**flags, crop="15,40,163,188", resize="bilinear")
    for other in ({}, {"crop": "15,35,163,183", "resize": "bilinear"}, {"crop": "15,40,163,188"}):
        with pytest.raises(UserError, match=r"with another (crop|resize).*overwrite"):
            prepare(**flags, **other)


def test_a_source_without_training_images(tmp_path):
    folder = tmp_path / "thumbnails128x128" / "60000"
    folder.mkdir(parents=True)
    Image.new("RGB", (128, 128)).save(folder / "60000.png")
    with pytest.raises(UserError, match=r"no images to train on \(1 validation\)"):
        prepare(layout="ffhq", source=str(tmp_path), resolution=64, data_dir=str(tmp_path / "data"), workers=1)


def test_second_run_does_nothing_and_overwrite_does(faces, tmp_path, capsys):
    flags = {"layout": "folder", "resolution": 64, "data_dir": str(tmp_path), "workers": 1}
    prepare(source=str(faces), **flags)
    assert "6 of 6 images are smaller than 64 pixels" in capsys.readouterr().out
    info = tmp_path / "folder" / "64" / "1.0.0" / "dataset_info.json"
    before = info.stat().st_ino
    prepare(source="/removed/since/faces", **flags)
    assert capsys.readouterr().out.startswith("already prepared: ")
    assert info.stat().st_ino == before
    with pytest.raises(UserError, match=r"prepared from 'faces' .*not 'other'.*name=NAME .*overwrite"):
        prepare(source="/somewhere/other", **flags)
    with pytest.raises(UserError, match=r"layout=folder\), not .*layout=celeba"):
        prepare(source=str(faces), name="folder", **flags | {"layout": "celeba"})
    assert info.stat().st_ino == before
    prepare(source=str(faces), overwrite=True, **flags)
    assert "\nprepared: " in capsys.readouterr().out
    assert info.stat().st_ino != before


def test_next_command_uses_the_config_that_exists(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("configs").mkdir()
    pathlib.Path("configs/celeba64.py").touch()
    command = next_command(DEFAULT_DATA_DIR, name="celeba", resolution=64, images=162_770)
    assert command == "python -m facevae_jax.main --config=configs/celeba64.py --workdir=/tmp/celeba64"
    assert "'--config.data.data_dir=/my data'" in next_command("/my data", name="celeba", resolution=32, images=128)


def test_tfds_layout(catalogue, capsys):
    prepare(layout="tfds", source="toy", resolution=32, data_dir=str(catalogue), workers=2)
    assert "note: toy has no validation split" in capsys.readouterr().out
    directory = reading.find_dataset(catalogue, name="toy", resolution=32)
    assert reading.split_sizes(directory) == {"train": 5, "validation": 1, "test": 6}
    depth, smiling = reading.read_attributes(directory, "test", ["depth", "smiling"]).T.tolist()
    assert (depth, smiling) == ([0.0, 0.5, 1.0, 1.5, 2.0, 2.5], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    kinds = reading.read_metadata(directory)["attributes"]
    assert kinds == [{"name": "depth", "kind": "continuous"}, {"name": "smiling", "kind": "binary"}]
    assert [tuple(image[0, 0]) for image in reading.read_images(directory, "test")] == [
        (i, 2 * i, 3 * i) for i in range(6)
    ]


def test_tfds_dataset_that_is_not_there_or_in_another_format(catalogue, tmp_path):
    for version in ("toy/2.0.1", "mine/32/1.0.0", "two/a/1.0.0", "two/b/1.0.0"):
        (tmp_path / version).mkdir(parents=True)
        (tmp_path / version / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    for source, folder, message in [
        ("lfw", catalogue, r"source='lfw': TFDS has not prepared it .*download_and_prepare\(\)"),
        ("toy", tmp_path, "format 'tfrecord', which need TensorFlow: move it away, then python -c"),
        ("mine", tmp_path, "TFDS has not prepared it"),  # a dataset of this project's, not TFDS's
        ("two", tmp_path, "choose one of two/a, two/b"),
    ]:
        with pytest.raises(UserError, match=message):
            open_layout("tfds", source, resolution=32, data_dir=str(folder))
