"""Every verb of `generate` on a small run, in process on eight devices; and the command itself."""

import pathlib

import numpy as np
import pytest
from PIL import Image

import facevae_jax
from facevae_jax.core.errors import UserError
from facevae_jax.data.dataset import Drawn
from facevae_jax.data.layouts.types import Attribute
from facevae_jax.generation import outputs, sheets, verbs
from facevae_jax.generation.verbs import Request
from facevae_jax.trained import codes, familiarity, labels
from facevae_jax.trained.directions import direction_of, kept_attributes
from tests.conftest import assert_nearly, run_module

SIDE, CELL = 32, 34


@pytest.fixture(scope="module")
def originals(trained) -> np.ndarray:
    return np.asarray(trained.dataset.images("validation"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, originals) -> list[str]:
    """Four of the drawn faces as files."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(4):
        Image.fromarray(originals[number]).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(4)]


def cells(path: pathlib.Path) -> np.ndarray:
    """The faces of a grid: [rows, columns, r, r, 3]."""
    image = np.pad(np.asarray(Image.open(path)), ((0, CELL - SIDE), (0, CELL - SIDE), (0, 0)))
    rows, columns = image.shape[0] // CELL, image.shape[1] // CELL
    return image.reshape(rows, CELL, columns, CELL, 3)[:, :SIDE, :, :SIDE].swapaxes(1, 2)


def array(path: pathlib.Path) -> np.ndarray:
    """The pictures in an .npz file."""
    with np.load(path) as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8
        return file["arr_0"]


def test_samples_do_not_depend_on_batches(workdir, trained, tmp_path):
    verbs.sample(trained, Request(output=str(tmp_path / "all.npz"), count=70, seed=1))
    small = facevae_jax.load(workdir, batch_size=8)
    verbs.sample(small, Request(output=str(tmp_path / "few.npz"), count=10, seed=1))
    many = array(tmp_path / "all.npz")
    assert many.shape == (70, SIDE, SIDE, 3)
    assert_nearly(array(tmp_path / "few.npz"), many[:10])
    assert_nearly(trained.sample(10, seed=1), many[:10])
    assert np.abs(trained.sample(10, seed=2).astype(int) - many[:10]).max() > 10


@pytest.mark.parametrize("prior", ["standard", "gaussian"])
def test_samples_of_a_prior_as_a_grid(trained, tmp_path, prior):
    message = verbs.sample(trained, Request(output=str(tmp_path / "x.png"), count=10, prior=prior))
    grid = cells(tmp_path / "x.png")
    assert grid.shape[:2] == (3, 4)
    assert_nearly(grid.reshape(-1, SIDE, SIDE, 3)[:10], trained.sample(10, prior=prior))
    assert (grid[2, 2:] == 255).all()
    assert prior in message


def test_samples_with_wanted_labels(trained, tmp_path):
    request = Request(output=str(tmp_path / "x.npz"), count=10, attribute=("glasses=1", "smile=0.5"))
    assert "glasses=1, smile=0.5" in verbs.sample(trained, request)
    faces = array(tmp_path / "x.npz")
    prior = trained.prior_given(["glasses=1", "smile=0.5"])
    assert_nearly(faces, trained.sample(10, prior=prior))
    assert np.abs(faces.astype(int) - trained.sample(10)).max() > 5
    columns = [label.name for label in trained.dataset.attributes]
    glasses = trained.dataset.labels("train").column("glasses")
    assert np.ptp(np.asarray(prior.labels)[:, columns.index("glasses")]) == 0
    expected = labels.EMPHASIS * (1 - glasses.mean()) / glasses.std()
    assert np.asarray(prior.labels)[0, columns.index("glasses")] == pytest.approx(expected, rel=1e-4)


def test_single_files(trained, tmp_path):
    verbs.sample(trained, Request(output=str(tmp_path / "faces"), format="png", count=11))
    names = sorted(path.name for path in (tmp_path / "faces").iterdir())
    assert names == [f"{number:06d}.png" for number in range(11)]
    assert_nearly(np.asarray(Image.open(tmp_path / "faces" / "000007.png")), trained.sample(11)[7])
    with pytest.raises(UserError, match="faces"):  # no other pictures are put among these
        verbs.sample(trained, Request(output=str(tmp_path / "faces"), count=2))
    assert len(list((tmp_path / "faces").iterdir())) == 11
    assert [path.name for path in tmp_path.iterdir()] == ["faces"]  # no temporary folder is left


def test_reconstructions_stand_below_their_originals(trained, originals, tmp_path):
    verbs.reconstruct(trained, Request(output=str(tmp_path / "x.png"), count=10))
    grid = cells(tmp_path / "x.png")
    assert grid.shape[:2] == (4, 8)
    np.testing.assert_array_equal(grid[0], originals[:8])
    np.testing.assert_array_equal(grid[2, :2], originals[8:10])
    expected = trained.decode(trained.encode(originals[:10]).mean)
    np.testing.assert_array_equal(np.concatenate([grid[1], grid[3, :2]]), expected)
    assert (grid[2:, 2:] == 255).all()


def test_reconstructions_of_photographs_keep_their_names(trained, originals, photographs, tmp_path):
    folder = str(pathlib.Path(photographs[0]).parent)
    verbs.reconstruct(trained, Request(output=str(tmp_path / "out"), images=(folder,)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1.png", "2.png", "3.png"]
    assert_nearly(np.asarray(Image.open(tmp_path / "out" / "2.png")), trained.reconstruct(originals[2:3])[0])
    verbs.reconstruct(trained, Request(output=str(tmp_path / "x.npz"), images=(folder,), count=3))
    assert len(array(tmp_path / "x.npz")) == 3


def test_reconstructions_of_a_split_from_draws(trained, originals, tmp_path):
    verbs.reconstruct(trained, Request(output=str(tmp_path / "drawn.npz"), posterior="sample"))
    drawn = array(tmp_path / "drawn.npz")
    assert drawn.shape == originals.shape
    assert np.abs(trained.reconstruct(originals).astype(int) - drawn).max() > 3


@pytest.mark.parametrize("method", ["lerp", "slerp"])
def test_interpolation_has_its_ends(trained, originals, photographs, tmp_path, method):
    for faces in ({"images": tuple(photographs[:3])}, {"split": "validation", "count": 3}):
        verbs.interpolate(trained, Request(output=str(tmp_path / "x.npz"), steps=4, path=method, **faces))
        found = array(tmp_path / "x.npz")
        assert len(found) == 9
        assert_nearly(found[::4], trained.reconstruct(originals[:3]))


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_interpolation_of_new_faces_as_an_animation(trained, tmp_path, name):
    verbs.interpolate(trained, Request(output=str(tmp_path / name), count=3, steps=2, loop=True))
    with Image.open(tmp_path / name) as animation:
        assert (animation.n_frames, animation.info["loop"]) == (4, 0)
        assert animation.size == (2 * CELL - 2, 2 * CELL - 2)  # three rows of faces side by side


def test_an_mp4_plays(trained, tmp_path):
    av = pytest.importorskip("av", reason="the extra `video` is not installed")
    verbs.interpolate(trained, Request(output=str(tmp_path / "a.mp4"), count=1, steps=5, fps=25.0))
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 6
    ends = trained.decode(trained.sample_codes(2))
    assert np.abs(frames[0].astype(int) - ends[0]).mean() < 8  # 4:2:0 color of a small picture
    assert np.abs(frames[-1].astype(int) - ends[1]).mean() < 8


def test_a_morph_has_the_photographs_at_its_ends(trained, originals, photographs, tmp_path):
    verbs.morph(trained, Request(output=str(tmp_path / "x.png"), images=tuple(photographs[:2]), steps=3))
    grid = cells(tmp_path / "x.png")[0]
    assert len(grid) == 6
    np.testing.assert_array_equal(grid[[0, -1]], originals[:2])
    assert_nearly(grid[[1, -2]], trained.reconstruct(originals[:2]))
    verbs.morph(trained, Request(output=str(tmp_path / "x.gif"), images=tuple(photographs[:2]), steps=3, loop=True))
    with Image.open(tmp_path / "x.gif") as animation:
        assert animation.n_frames == 6  # 0 1 2 3 2 1


def test_a_morph_of_four_is_a_square(trained, originals, tmp_path):
    verbs.morph(trained, Request(output=str(tmp_path / "x.png"), rows=(0, 1, 2, 3), steps=2))
    grid = cells(tmp_path / "x.png")
    assert grid.shape[:2] == (3, 3)
    assert_nearly(grid[[0, 0, 2, 2], [0, 2, 0, 2]], trained.reconstruct(originals[:4]))


@pytest.mark.parametrize("method", ["mean", "regression"])
def test_an_edit_of_nothing_is_the_reconstruction(trained, originals, tmp_path, method):
    given = {"rows": (4, 5), "attribute": ("smile", "glasses"), "alpha": (-2.0, 0.0, 2.0), "keep": ("turn",)}
    message = verbs.edit(trained, Request(output=str(tmp_path / "x.png"), direction=method, **given))
    grid = cells(tmp_path / "x.png")
    assert grid.shape[:2] == (4, 3)
    assert_nearly(grid[:, 1], trained.reconstruct(originals[[4, 4, 5, 5]]))
    assert np.abs(grid[:, 0].astype(int) - grid[:, 2]).max() > 3
    assert all(name in message for name in ("smile", "glasses", method))


def test_single_files_of_an_edit_name_face_attribute_and_alpha(trained, originals, tmp_path):
    photograph = tmp_path / "john.smith.png"
    Image.fromarray(originals[0]).save(photograph)
    given = {"images": (str(photograph),), "attribute": ("smile",), "alpha": (-0.5, 0.5, 0.75)}
    verbs.edit(trained, Request(output=str(tmp_path / "out"), **given))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"john.smith_smile_{alpha}.png" for alpha in ("-0.5", "+0.5", "+0.75")} <= names


def test_names_of_any_kind_become_file_names():
    long = outputs.unique(["\u9762" * 300 + "_smile_+1", "\u9762" * 300 + "_smile_+2", "a/b\udcff", "", ""])
    assert len(set(long)) == 5
    assert all(name and len(name.encode()) < 250 and "/" not in name for name in long)
    assert long[1].endswith("_smile_+2")


def test_kept_attributes(trained, monkeypatch):
    assert len(direction_of(trained, "glasses", keep=("all",)).kept) == 22
    kinds = (Attribute("smile", "continuous"), Attribute("glasses", "binary"), Attribute("city", "categorical", ("a",)))
    monkeypatch.setattr(Drawn, "attributes", kinds)
    assert kept_attributes(trained, "smile", ("all",)) == ["glasses"]
    for attribute, keep, mentioned in (("smile", ("city",), "keep=city"), ("city", (), "attribute=city")):
        with pytest.raises(UserError, match=mentioned):
            kept_attributes(trained, attribute, keep)
    monkeypatch.setattr(Drawn, "attributes", ())
    with pytest.raises(UserError, match="attribute=smile"):
        verbs.edit(trained, Request(attribute=("smile",)))


def test_a_traversal_moves_one_dimension(trained, tmp_path):
    request = Request(output=str(tmp_path / "x.npz"), dimensions=(3, 0), alpha=(-1.0, 0.0, 2.0))
    verbs.traverse(trained, request)
    latents = np.tile(trained.moments.mean, (2, 3, 1))
    deviations = np.sqrt(np.diag(trained.moments.covariance))
    for row, dimension in enumerate((3, 0)):
        latents[row, :, dimension] += deviations[dimension] * np.array([-1, 0, 2])
    assert_nearly(array(tmp_path / "x.npz"), trained.decode(latents.reshape(6, 8)))
    message = verbs.traverse(trained, Request(output=str(tmp_path / "y.png"), count=2))
    assert f"dimensions {', '.join(map(str, sheets.strongest_dimensions(trained)[:2]))}," in message


def test_encoding_writes_codes_with_names_and_labels(trained, originals, photographs, tmp_path):
    verbs.encode(trained, Request(output=str(tmp_path / "x.npz")))
    with np.load(tmp_path / "x.npz", allow_pickle=False) as table:
        np.testing.assert_allclose(table["mean"], trained.encode(originals).mean, atol=1e-5)
        assert table["names"][3] == "validation_3"
        assert table["attributes"].shape == (37, 23)
        glasses = table["attributes"][:, table["attribute_names"].tolist().index("glasses")]
        assert set(np.unique(glasses)) <= {0.0, 1.0}
    verbs.encode(trained, Request(output=str(tmp_path / "y.npz"), images=tuple(photographs), posterior="sample"))
    with np.load(tmp_path / "y.npz", allow_pickle=False) as table:
        assert table["names"].tolist() == photographs
        assert np.abs(table["mean"] - trained.encode(originals[:4]).mean).max() > 0.01


def test_codes_as_parquet(trained, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `parquet` is not installed")
    verbs.encode(trained, Request(output=str(tmp_path / "x.parquet")))
    table, expected = parquet.read_table(tmp_path / "x.parquet"), trained.codes.table("validation")
    np.testing.assert_array_equal(np.stack(table["mean"].to_pylist()).astype(np.float32), expected.posterior.mean)
    np.testing.assert_allclose(table["smile"].to_numpy(), expected.labels.column("smile"))
    attributes = (expected.labels.attributes[0]._replace(name="mean"), *expected.labels.attributes[1:])
    taken = expected._replace(labels=expected.labels._replace(attributes=attributes))
    with pytest.raises(UserError, match="'mean'"):  # the name of another column
        codes.write_parquet(tmp_path / "y.parquet", taken)
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


@pytest.mark.parametrize(
    ("verb", "request_", "mentioned"),
    [
        ("edit", {}, "attribute"),
        ("edit", {"attribute": ("smyle",)}, "smyle.* smile"),
        ("edit", {"attribute": ("smile",), "keep": ("gender",)}, "keep=gender"),
        ("edit", {"attribute": ("smile",), "keep": ("smile",)}, "keep=smile"),
        ("edit", {"attribute": ("smile",), "alpha": (0.0, 40.0)}, "alpha=40"),
        ("edit", {"attribute": ("smile",), "alpha": (float("nan"),)}, "alpha=nan"),
        ("sample", {"attribute": ("smile",)}, "attribute=smile=1"),
        ("sample", {"attribute": ("glases=1",)}, "glasses"),
        ("sample", {"attribute": ("glasses=2",)}, "attribute=glasses=2.*0 or 1"),
        ("sample", {"attribute": ("smile=broad",)}, "attribute=smile=broad.*number"),
        ("sample", {"attribute": ("smile=1",), "prior": "gaussian"}, "prior=flow"),
        ("traverse", {"dimensions": (8,)}, "dimensions=8"),
        ("reconstruct", {"rows": (37,)}, "rows=37"),
        ("reconstruct", {"split": "test", "output": "x.npz"}, "split='test'"),
        ("reconstruct", {"images": ("/nowhere/x.png",)}, "/nowhere/x.png"),
        ("reconstruct", {"images": (__file__,)}, "test_generate.py"),
        ("morph", {"rows": (0, 1, 2)}, "3"),
        ("sample", {"count": 20_000}, "20,000"),
        ("interpolate", {"count": 2, "steps": 60_000, "output": "x.npz"}, "120,002"),
        ("sample", {"output": "..", "format": "png"}, r"output='..'"),
        ("sample", {"output": "x.jpg"}, "output='x.jpg'"),
        ("sample", {"output": "x.png", "format": "npz"}, r"x\.png.*format=npz"),
        ("sample", {"output": "x.gif"}, "format=gif"),
        ("sample", {"output": "x.npz", "scale": 2}, "scale=2"),
        ("sample", {"output": "x.npz", "labels": True}, "labels"),
        ("sample", {"count": 2_000, "scale": 16}, "2,000 pictures"),
        ("interpolate", {"count": 8, "steps": 2_000, "output": "x.gif", "scale": 16}, "512 pixels"),
        ("encode", {"output": "x.csv"}, r"x\.csv"),
    ],
)
def test_mistakes_name_the_flag_or_the_value(trained, tmp_path, monkeypatch, verb, request_, mentioned):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=mentioned):
        verbs.VERBS[verb](trained, Request(**request_))
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_enlarged_without_new_colors(trained, tmp_path):
    for scale in (1, 3):
        verbs.sample(trained, Request(output=str(tmp_path / f"{scale}"), count=2, scale=scale))
        verbs.sample(trained, Request(output=str(tmp_path / f"{scale}.png"), count=2, scale=scale))
    for name in ("000000.png", "000001.png"):
        small, large = (np.asarray(Image.open(tmp_path / scale / name)) for scale in "13")
        np.testing.assert_array_equal(large, np.kron(small, np.ones((3, 3, 1), np.uint8)))
    assert np.asarray(Image.open(tmp_path / "3.png")).shape == (3 * SIDE, 2 * 3 * SIDE + 2, 3)


@pytest.mark.parametrize(
    ("verb", "request_", "rows", "columns"),
    [
        ("sample", {"count": 4}, 2, 0),
        ("traverse", {"count": 2, "alpha": (-1.0, 0.0, 1.0)}, 2, 3),
        ("edit", {"count": 1, "attribute": ("smile", "glasses"), "alpha": (0.0, 2.0)}, 2, 2),
        ("reconstruct", {"rows": (0, 1)}, 2, 0),
        ("morph", {"rows": (0, 1), "steps": 2}, 0, 2),  # the ends have names
        ("interpolate", {"rows": (0, 1, 2), "steps": 2}, 0, 3),  # each face has
    ],
)
def test_labels_stand_in_the_margin_of_the_grid(trained, tmp_path, verb, request_, rows, columns):
    """The grid is there pixel by pixel; beside it is one text a row, and above it one a column."""
    plain, labeled = tmp_path / "plain.png", tmp_path / "labeled.png"
    for path in (plain, labeled):
        verbs.VERBS[verb](trained, Request(output=str(path), labels=path == labeled, scale=2, **request_))
    grid, page = np.asarray(Image.open(plain)), np.asarray(Image.open(labeled))
    top, left = page.shape[0] - grid.shape[0], page.shape[1] - grid.shape[1]
    np.testing.assert_array_equal(page[top:, left:], grid)
    cell = 2 * SIDE + 2
    beside, above = (
        page[top:, :left].min(axis=(1, 2), initial=255) < 128,
        page[:top].min(axis=(0, 2), initial=255) < 128,
    )
    assert sum(beside[at : at + cell].any() for at in range(0, len(beside), cell)) == rows
    assert sum(above[at : at + cell].any() for at in range(left, len(above), cell)) == columns


@pytest.mark.slow
def test_the_command(workdir, tmp_path):
    output = tmp_path / "x.png"
    flags = ["--attribute=smile", "--alpha=-1,0,1.5", "--count=2", f"--output={output}"]
    result = run_module("facevae_jax.generate", "edit", f"--workdir={workdir}", *flags)
    assert result.returncode == 0, result.stderr
    assert cells(output).shape[:2] == (2, 3)


def test_photographs_unlike_the_training_faces_are_noted(trained, tmp_path, capsys):
    """Checks in noise, which a model of faces cannot reconstruct, and faces like those that it knows."""
    noise = np.random.default_rng(0).integers(0, 2, (32, 32, 3)).astype(np.uint8) * 255
    known = trained.dataset.images("validation")
    assert not familiarity.unlike_training(trained, known).any()
    assert familiarity.unlike_training(trained, np.stack([known[0], noise])).tolist() == [False, True]
    for name, image in {"face": known[0], "noise": noise}.items():
        Image.fromarray(image).save(tmp_path / f"{name}.png")
        request = verbs.Request(output=str(tmp_path / "out.png"), images=[str(tmp_path / f"{name}.png")])
        verbs.reconstruct(trained, request)
        assert ("note: noise" in capsys.readouterr().err) == (name == "noise")
