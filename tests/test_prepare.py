import os
import pathlib

import pytest
from PIL import Image

from facevae_jax import prepare
from facevae_jax.data import dataset, records
from facevae_jax.errors import UserError
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
def data_dir(faces: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where `folder` is prepared at 32 pixels."""
    data_dir = tmp_path_factory.mktemp("data")
    prepare.prepare(layout="folder", source=str(faces), resolution=32, data_dir=str(data_dir), workers=1)
    return data_dir


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory, faces: pathlib.Path) -> pathlib.Path:
    """A data_dir with `toy`, a dataset as TFDS writes it: truth values, floats, texts and images of any size."""
    tfds = records.import_tfds()
    import numpy as np

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


def test_command_from_images_to_the_next_command(faces, tmp_path):
    flags = ["--layout=folder", f"--source={faces}", "--resolution=32", f"--data_dir={tmp_path}", "--workers=2"]
    result = run_module(MODULE, *flags)
    assert result.returncode == 0, result.stderr
    prepared, following = result.stdout.splitlines()
    directory = tmp_path / "folder" / "32" / "1.0.0"
    assert prepared.startswith(f"prepared: {directory} (5 train, 1 validation; ")
    assert "python -m facevae_jax.main --config=configs/ffhq128.py --config.data.name=folder" in following
    assert f"--config.data.resolution=32 --config.data.data_dir={tmp_path}" in following
    assert "--config.train.batch_size=4 --workdir=/tmp/folder32" in following  # 128 would be refused: 5 images train
    colours = {tuple(image[5, 5]) for image in dataset.read_images(directory, "train")}
    assert colours < {(i, 2 * i, 3 * i) for i in range(6)}
    again = run_module(MODULE, *flags)
    assert again.returncode == 0
    assert again.stdout.startswith(f"already prepared: {directory} (5 train, 1 validation)")


@pytest.mark.parametrize(
    ("flags", "mentioned"),
    [
        (["--layout=folder", "--source=/nowhere/at/all", "--resolution=32"], ["/nowhere/at/all", "does not exist"]),
        (["--layout=imagenet", "--source=x", "--resolution=32"], ["--layout=imagenet", "ffhq, celeba, folder, tfds"]),
        (["somewhere"], ["somewhere", "--source"]),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(flags, mentioned, tmp_path):
    assert_one_line_error(run_module(MODULE, f"--data_dir={tmp_path}", *flags), *mentioned)


@pytest.mark.parametrize("resolution", [None, 0, -64, 16, 48, 2048])
def test_resolutions(resolution, faces, tmp_path):
    with pytest.raises(UserError, match=r"--resolution=.*power of two from 32 to 1024"):
        prepare.prepare(layout="folder", source=str(faces), resolution=resolution, data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"layout": None}, "--layout="),
        ({"source": None}, "--source is missing"),
        ({"name": "../up"}, "--name='../up'"),
        ({"name": "synthetic"}, "--name='synthetic'"),
        ({"workers": 0}, "--workers=0"),
        ({"attributes": "x"}, "--attributes='x': give a file .csv, .json or .jsonl"),
    ],
)
def test_impossible_flags(flags, message, faces, tmp_path):
    given = {"layout": "folder", "source": str(faces), "resolution": 32, "data_dir": str(tmp_path)}
    with pytest.raises(UserError, match=message) as caught:
        prepare.prepare(**(given | flags))
    assert "\n" not in str(caught.value)


def test_a_data_dir_that_cannot_be_written(faces, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data_dir="):
        prepare.prepare(layout="folder", source=str(faces), resolution=32, data_dir=str(tmp_path / "file"))


def test_a_source_without_training_images(tmp_path):
    folder = tmp_path / "thumbnails128x128" / "60000"
    folder.mkdir(parents=True)
    Image.new("RGB", (128, 128)).save(folder / "60000.png")
    with pytest.raises(UserError, match=r"no images to train on \(1 validation\)"):
        prepare.prepare(layout="ffhq", source=str(tmp_path), resolution=64, data_dir=str(tmp_path / "data"), workers=1)


def test_second_run_does_nothing_and_overwrite_does(data_dir, faces, capsys):
    flags = {"layout": "folder", "resolution": 32, "data_dir": str(data_dir), "workers": 1}
    info = data_dir / "folder" / "32" / "1.0.0" / "dataset_info.json"
    before = info.stat().st_ino
    prepare.prepare(source="/removed/since/faces", **flags)
    assert capsys.readouterr().out.startswith("already prepared: ")
    assert info.stat().st_ino == before
    with pytest.raises(UserError, match=r"prepared from 'faces' .*not 'other'.*--name=NAME .*--overwrite"):
        prepare.prepare(source="/somewhere/other", **flags)
    with pytest.raises(UserError, match=r"--layout=folder\), not .*--layout=celeba"):
        prepare.prepare(source=str(faces), name="folder", **flags | {"layout": "celeba"})
    assert info.stat().st_ino == before
    prepare.prepare(source=str(faces), overwrite=True, **flags)
    assert capsys.readouterr().out.startswith("prepared: ")
    assert info.stat().st_ino != before


def test_file_names_in_another_encoding(tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    for name in (b"caf\xe9.png", b"b.png"):
        Image.new("RGB", (32, 32)).save(folder / os.fsdecode(name))
    prepare.prepare(layout="folder", source=str(folder), resolution=32, data_dir=str(tmp_path), workers=1)
    directory = dataset.find_dataset(tmp_path, name="folder", resolution=32)
    assert dataset.split_sizes(directory) == {"train": 1, "validation": 1}


def test_enlarged_images_are_told(faces, tmp_path, capsys):
    prepare.prepare(layout="folder", source=str(faces), resolution=64, data_dir=str(tmp_path), name="faces", workers=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "note: 6 of 6 images are smaller than 64 pixels and were enlarged."
    assert lines[1].startswith("prepared: ")


def test_bad_images_are_an_error_or_left_out(tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (40, 40)).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes(b"")
    flags = ["--layout=folder", f"--source={folder}", "--resolution=32", f"--data_dir={tmp_path}"]
    listed = tmp_path / "folder" / "32" / "incomplete" / "bad_images.jsonl"
    assert_one_line_error(run_module(MODULE, *flags), "1 of 6 images", "2.png", str(listed), "--on_bad_image=skip")
    assert listed.read_text().startswith('{"path": "2.png", "reason": "')
    result = run_module(MODULE, *flags, "--on_bad_image=skip")
    assert result.returncode == 0, result.stderr
    directory = tmp_path / "folder" / "32" / "1.0.0"
    assert f"note: 1 images were left out: see {directory / 'bad_images.jsonl'}." in result.stdout
    assert "note: 5 images were taken over from a run that was stopped." in result.stdout


def test_next_command_uses_the_config_that_exists(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("configs").mkdir()
    pathlib.Path("configs/celeba64.py").touch()
    default = prepare.DEFAULT_DATA_DIR
    command = prepare.next_command(default, name="celeba", resolution=64, images=162_770)
    assert command == "python -m facevae_jax.main --config=configs/celeba64.py --workdir=/tmp/celeba64"
    command = prepare.next_command("/my data", name="celeba", resolution=32, images=128)
    assert command == (
        "python -m facevae_jax.main --config=configs/ffhq128.py --config.data.name=celeba --config.data.resolution=32 "
        "'--config.data.data_dir=/my data' --workdir=/tmp/celeba32"
    )


def test_tfds_layout(catalogue, capsys):
    prepare.prepare(layout="tfds", source="toy", resolution=32, data_dir=str(catalogue), workers=2)
    assert "note: toy has no validation split" in capsys.readouterr().out
    directory = dataset.find_dataset(catalogue, name="toy", resolution=32)
    assert dataset.split_sizes(directory) == {"train": 5, "validation": 1, "test": 6}
    attributes = dataset.read_attributes(directory, "test")
    assert {name: values.tolist() for name, values in attributes.items()} == {
        "depth": [0.0, 0.5, 1.0, 1.5, 2.0, 2.5],
        "smiling": [0.0, 0.0, 0.0, 1.0, 1.0, 1.0],
    }
    kinds = dataset.read_metadata(directory)["attributes"]
    assert kinds == [{"name": "depth", "kind": "continuous"}, {"name": "smiling", "kind": "binary"}]
    assert [tuple(image[0, 0]) for image in dataset.read_images(directory, "test")] == [
        (i, 2 * i, 3 * i) for i in range(6)
    ]


def test_tfds_dataset_that_is_not_there_or_in_another_format(catalogue, tmp_path):
    def open_toy(source: str, data_dir: pathlib.Path) -> None:
        prepare.open_layout("tfds", source, resolution=32, data_dir=str(data_dir))

    with pytest.raises(UserError, match=r"--source='lfw': TFDS has not prepared it .*download_and_prepare\(\)"):
        open_toy("lfw", catalogue)
    version = tmp_path / "toy" / "2.0.1"
    version.mkdir(parents=True)
    text = (catalogue / "toy" / "2.0.1" / "dataset_info.json").read_text()
    (version / "dataset_info.json").write_text(text.replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match="format 'tfrecord', which need TensorFlow: move it away, then python -c"):
        open_toy("toy", tmp_path)
    (tmp_path / "mine" / "32" / "1.0.0").mkdir(parents=True)  # a dataset of this project's, not TFDS's
    (tmp_path / "mine" / "32" / "1.0.0" / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="TFDS has not prepared it"):
        open_toy("mine", tmp_path)
    for config in ("a", "b"):
        (tmp_path / "two" / config / "1.0.0").mkdir(parents=True)
        (tmp_path / "two" / config / "1.0.0" / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="choose one of two/a, two/b"):
        open_toy("two", tmp_path)
