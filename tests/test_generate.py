"""Every verb of `generate` on a small run, in process on eight devices; and the command itself where flags matter."""

import json
import pathlib

import numpy as np
import pytest
from PIL import ExifTags, Image

import facevae_jax
from facevae_jax.data import synthetic
from facevae_jax.data.labels import open_attributes
from facevae_jax.data.layouts import Attribute
from facevae_jax.data.pixels import open_splits
from facevae_jax.errors import UserError
from facevae_jax.generation import latent_tables, outputs, second_stage, sheets, verbs
from facevae_jax.generation.trained import TrainedVAE
from facevae_jax.generation.verbs import Request
from facevae_jax.training import loop
from tests.conftest import assert_one_line_error, run_module

SIDE, CELL = 32, 34


@pytest.fixture(autouse=True)
def short_second_stage(monkeypatch):
    """How well it learns is tested where the priors are."""
    monkeypatch.setattr(second_stage, "EPOCHS", 1)
    monkeypatch.setattr(second_stage, "MIN_STEPS", 20)


@pytest.fixture(scope="module")
def workdir(tiny_config, tmp_path_factory) -> pathlib.Path:
    """A run of two epochs."""
    workdir = tmp_path_factory.mktemp("generate") / "run"
    loop.train(tiny_config, workdir)
    return workdir


@pytest.fixture(scope="module")
def trained(workdir) -> TrainedVAE:
    return facevae_jax.load(workdir)


@pytest.fixture(scope="module")
def originals(tiny_config) -> np.ndarray:
    return np.asarray(open_splits(tiny_config.data).evaluation)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, originals) -> list[str]:
    """Four of the drawn faces as files."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(4):
        Image.fromarray(originals[number]).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(4)]


def cells(path: pathlib.Path) -> np.ndarray:
    """The faces of a grid: [rows, columns, r, r, 3]."""
    image = np.asarray(Image.open(path))
    rows, columns = (image.shape[0] + 2) // CELL, (image.shape[1] + 2) // CELL
    assert image.shape == (rows * CELL - 2, columns * CELL - 2, 3)
    return np.stack(
        [[image[r * CELL : r * CELL + SIDE, c * CELL : c * CELL + SIDE] for c in range(columns)] for r in range(rows)]
    )


def test_the_model_is_one_object(trained, originals):
    assert (trained.resolution, trained.latent_dim) == (SIDE, 8)
    posterior = trained.encode(originals)
    assert posterior.mean.shape == posterior.log_variance.shape == (37, 8)
    np.testing.assert_array_equal(trained.decode(posterior.mean), trained.reconstruct(originals))
    floats = trained.encode(originals.astype(np.float32) / 255)
    np.testing.assert_allclose(floats.mean, posterior.mean, atol=1e-5)
    assert trained.encode(originals[:0]).mean.shape == (0, 8)


def test_one_device_gives_what_eight_give(trained, originals):
    from facevae_jax.models.inference import Inference

    variables = {name: trained.variables[name] for name in trained.variables}
    alone = Inference(trained.module, variables, batch_size=5)
    np.testing.assert_allclose(alone.encode(originals).mean, trained.encode(originals).mean, atol=1e-5)


def test_posterior_samples_have_their_mean_and_deviation(trained, originals):
    posterior = trained.encode(originals[:2])
    drawn = np.stack([trained.posterior_sample(posterior, seed=seed) for seed in range(2000)])
    deviation = np.exp(0.5 * posterior.log_variance)
    np.testing.assert_allclose(drawn.mean(0), posterior.mean, atol=0.15 * deviation.max())
    np.testing.assert_allclose(drawn.std(0), deviation, rtol=0.1)
    np.testing.assert_array_equal(
        trained.posterior_sample(posterior, seed=3)[1:],
        trained.posterior_sample(type(posterior)(*(part[1:] for part in posterior)), seed=3, first=1),
    )


def test_samples_do_not_depend_on_how_many_are_asked_for(workdir, trained, tmp_path):
    verbs.sample(trained, Request(output=str(tmp_path / "all.npz"), count=70, seed=1))
    small = facevae_jax.load(workdir, batch_size=8)
    message = verbs.sample(small, Request(output=str(tmp_path / "few.npz"), count=10, seed=1))
    with np.load(tmp_path / "all.npz") as many, np.load(tmp_path / "few.npz") as few:
        assert many.files == ["arr_0"]
        assert many["arr_0"].dtype == np.uint8
        assert many["arr_0"].shape == (70, SIDE, SIDE, 3)
        assert few["arr_0"].shape == (10, SIDE, SIDE, 3)
        assert np.abs(many["arr_0"][:10].astype(int) - few["arr_0"]).max() <= 1
        assert np.abs(many["arr_0"][:10].astype(int) - trained.sample(10, seed=1)).max() <= 1
    assert "10 faces from step 20, prior gaussian" in message
    other = trained.sample(10, seed=2)
    assert np.abs(other.astype(int) - trained.sample(10, seed=1)).max() > 10


@pytest.mark.parametrize("prior", ["standard", "gaussian", "mixture", "second_stage"])
def test_every_prior_gives_a_grid(trained, tmp_path, prior):
    verbs.sample(trained, Request(output=str(tmp_path / "x.png"), count=10, prior=prior))
    grid = cells(tmp_path / "x.png")
    assert grid.shape[:2] == (3, 4)
    assert np.abs(grid.reshape(-1, SIDE, SIDE, 3)[:10].astype(int) - trained.sample(10, prior=prior)).max() <= 1
    assert (grid[2, 2:] == 255).all()


def test_fitted_priors_are_kept_and_read_again(trained, workdir):
    for prior in ("mixture", "second_stage"):
        first = trained.sample_latents(5, prior=prior)
        path = workdir / "priors" / f"{prior}_{trained.identity}.npz"
        kept = path.read_bytes()
        np.testing.assert_array_equal(trained.sample_latents(5, prior=prior), first)
        assert path.read_bytes() == kept
        path.write_bytes(kept[: len(kept) // 2])  # half a file is no prior: it is fitted again
        np.testing.assert_allclose(trained.sample_latents(5, prior=prior), first, atol=1e-4)
        assert len(path.read_bytes()) == len(kept)


def test_temperature_zero_gives_the_mean_face(trained):
    latents = trained.sample_latents(3, prior="gaussian", temperature=0.0)
    np.testing.assert_allclose(latents, np.tile(trained.mean_latent, (3, 1)), atol=1e-6)
    with pytest.raises(UserError, match="temperature=-1"):
        trained.sample_latents(3, temperature=-1.0)


def test_single_files(trained, tmp_path):
    verbs.sample(trained, Request(output=str(tmp_path / "faces"), format="png", count=11))
    names = sorted(path.name for path in (tmp_path / "faces").iterdir())
    assert names == [f"{number:06d}.png" for number in range(11)]
    image = np.asarray(Image.open(tmp_path / "faces" / "000007.png"))
    assert np.abs(image.astype(int) - trained.sample(11)[7]).max() <= 1
    with pytest.raises(UserError, match="new folder"):
        verbs.sample(trained, Request(output=str(tmp_path / "faces"), count=2))
    assert len(list((tmp_path / "faces").iterdir())) == 11
    assert [path.name for path in tmp_path.iterdir()] == ["faces"]  # nothing is left aside


def test_reconstructions_stand_below_their_originals(trained, originals, tmp_path):
    verbs.reconstruct(trained, Request(output=str(tmp_path / "x.png"), count=10))
    grid = cells(tmp_path / "x.png")
    assert grid.shape[:2] == (4, 8)
    np.testing.assert_array_equal(grid[0], originals[:8])
    np.testing.assert_array_equal(grid[1], trained.reconstruct(originals[:8]))
    np.testing.assert_array_equal(grid[2, :2], originals[8:10])
    assert (grid[2:, 2:] == 255).all()


def test_reconstructions_of_photographs_keep_their_names(trained, originals, photographs, tmp_path):
    verbs.reconstruct(
        trained, Request(output=str(tmp_path / "out"), images=(str(pathlib.Path(photographs[0]).parent),))
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1.png", "2.png", "3.png"]
    image = np.asarray(Image.open(tmp_path / "out" / "2.png"))
    assert np.abs(image.astype(int) - trained.reconstruct(originals[2:3])[0]).max() <= 1


def test_reconstructions_of_a_split_and_from_drawn_latents(trained, originals, tmp_path):
    verbs.reconstruct(trained, Request(output=str(tmp_path / "mean.npz")))
    verbs.reconstruct(trained, Request(output=str(tmp_path / "drawn.npz"), posterior="sample"))
    mean, drawn = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("mean", "drawn"))
    assert np.abs(mean.astype(int) - trained.reconstruct(originals)).max() <= 1
    assert mean.shape == drawn.shape
    assert np.abs(mean.astype(int) - drawn).max() > 3


@pytest.mark.parametrize("method", ["lerp", "slerp"])
def test_interpolation_has_its_ends(trained, photographs, tmp_path, method):
    verbs.interpolate(
        trained, Request(output=str(tmp_path / "x.npz"), images=tuple(photographs[:3]), steps=4, path=method)
    )
    faces = np.load(tmp_path / "x.npz")["arr_0"]
    images = facevae_jax.read_faces(*photographs[:3], resolution=SIDE).images
    assert len(faces) == 9
    assert np.abs(faces[::4].astype(int) - trained.reconstruct(images)).max() <= 1


def test_interpolation_of_new_faces_as_an_animation(trained, tmp_path):
    for name, frames in (("a.gif", 4), ("a.webp", 4)):
        verbs.interpolate(trained, Request(output=str(tmp_path / name), count=3, steps=2, loop=True))
        with Image.open(tmp_path / name) as animation:
            assert animation.n_frames == frames
            assert animation.info["loop"] == 0
            assert animation.size == (2 * CELL - 2, 2 * CELL - 2)  # three rows of faces side by side


def test_an_mp4_plays(trained, tmp_path):
    av = pytest.importorskip("av", reason="the extra `video` is not installed")
    verbs.interpolate(trained, Request(output=str(tmp_path / "a.mp4"), count=1, steps=5, frames_per_second=25.0))
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 6
    ends = trained.decode(trained.sample_latents(2))
    assert np.abs(frames[0].astype(int) - ends[0]).mean() < 8  # 4:2:0 colour of a small picture
    assert np.abs(frames[-1].astype(int) - ends[1]).mean() < 8


def test_a_morph_has_the_photographs_at_its_ends(trained, originals, photographs, tmp_path):
    verbs.morph(trained, Request(output=str(tmp_path / "x.png"), images=tuple(photographs[:2]), steps=3))
    grid = cells(tmp_path / "x.png")[0]
    ends = trained.reconstruct(originals[:2])
    np.testing.assert_array_equal(grid[[0, -1]], originals[:2])
    assert np.abs(grid[[1, -2]].astype(int) - ends).max() <= 1
    assert len(grid) == 6
    verbs.morph(trained, Request(output=str(tmp_path / "x.gif"), images=tuple(photographs[:2]), steps=3, loop=True))
    with Image.open(tmp_path / "x.gif") as animation:
        assert animation.n_frames == 6  # 0 1 2 3 2 1


def test_a_morph_of_four_is_a_square(trained, originals, tmp_path):
    verbs.morph(trained, Request(output=str(tmp_path / "x.png"), rows=(0, 1, 2, 3), steps=2))
    grid = cells(tmp_path / "x.png")
    assert grid.shape[:2] == (3, 3)
    corners = grid[[0, 0, 2, 2], [0, 2, 0, 2]]
    assert np.abs(corners.astype(int) - trained.reconstruct(originals[:4])).max() <= 1
    with pytest.raises(UserError, match="two faces, or four"):
        verbs.morph(trained, Request(rows=(0, 1, 2)))


@pytest.mark.parametrize("method", ["mean", "regression"])
def test_an_edit_of_nothing_is_the_reconstruction(trained, originals, tmp_path, method):
    request = Request(
        output=str(tmp_path / "x.png"),
        rows=(4, 5),
        attributes=("smile", "glasses"),
        alphas=(-2.0, 0.0, 2.0),
        keep=("turn",),
        method=method,
    )
    message = verbs.edit(trained, request)
    grid = cells(tmp_path / "x.png")
    assert grid.shape[:2] == (4, 3)
    expected = trained.reconstruct(originals[4:6]).astype(int)
    assert np.abs(grid[:, 1] - expected[[0, 0, 1, 1]]).max() <= 1
    assert np.abs(grid[:, 0].astype(int) - grid[:, 2]).max() > 3
    assert "smile" in message
    assert f"by {method}" in message


def test_single_files_of_an_edit_say_whose_they_are_and_how_far(trained, photographs, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("john.smith.png", f"{'x' * 120}.png"):
        (tmp_path / "in" / name).write_bytes(pathlib.Path(photographs[0]).read_bytes())
    request = Request(
        output=str(tmp_path / "out"), images=(str(tmp_path / "in"),), attributes=("smile",), alphas=(-0.5, 0.5, 0.75)
    )
    verbs.edit(trained, request)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    for alpha in ("-0.5", "+0.5", "+0.75"):
        assert {f"john.smith_smile_{alpha}.png", f"{'x' * 120}_smile_{alpha}.png"} <= names


def test_names_of_any_kind_become_file_names():
    long = outputs.unique(["\u9762" * 300 + "_smile_+1", "\u9762" * 300 + "_smile_+2", "a/b\udcff", "", ""])
    assert len(set(long)) == 5
    assert all(name and len(name.encode()) < 250 and "/" not in name for name in long)
    assert long[1].endswith("_smile_+2")


def test_faces_of_a_split_are_what_verbs_begin_with(trained, originals, tmp_path):
    verbs.interpolate(trained, Request(output=str(tmp_path / "x.npz"), split="validation", count=2, steps=2))
    way = np.load(tmp_path / "x.npz")["arr_0"]
    expected = trained.reconstruct(originals[:2]).astype(int)
    assert np.abs(way[[0, -1]].astype(int) - expected).max() <= 1
    verbs.traverse(trained, Request(output=str(tmp_path / "y.npz"), split="validation", dimensions=(0,), alphas=(0.0,)))
    assert np.abs(np.load(tmp_path / "y.npz")["arr_0"].astype(int) - expected[:1]).max() <= 1


def test_no_more_photographs_than_are_asked_for(trained, photographs, tmp_path):
    folder = str(pathlib.Path(photographs[0]).parent)
    verbs.reconstruct(trained, Request(output=str(tmp_path / "x.npz"), images=(folder,), count=3))
    assert len(np.load(tmp_path / "x.npz")["arr_0"]) == 3
    verbs.reconstruct(trained, Request(output=str(tmp_path / "x.png"), images=(folder,), count=3))
    assert cells(tmp_path / "x.png").shape[:2] == (2, 3)


def test_a_direction_is_not_anothers_whose_file_has_its_name(trained, monkeypatch):
    from facevae_jax.generation import directions

    monkeypatch.setattr(directions, "file_name", lambda *parts: "same")
    for name in ("skin_tone", "background"):
        assert directions.direction_of(trained, name).attribute == name


def test_labels_that_were_prepared_anew_are_read_anew(trained, monkeypatch):
    from facevae_jax.generation.directions import direction_of

    before = direction_of(trained, "beard").counts
    changed = open_attributes(trained.config.data, "train")
    number = [attribute.name for attribute in changed.attributes].index("beard")
    changed.values[:, number] = 1 - changed.values[:, number]
    monkeypatch.setattr(latent_tables, "open_attributes", lambda *of: changed)
    monkeypatch.setattr(synthetic, "VERSION", "1.0.1")  # what tells prepared data apart is their checksums
    assert direction_of(trained, "beard").counts == before[::-1]


def test_all_are_kept_but_categories(trained, monkeypatch):
    from facevae_jax.generation.directions import kept_attributes

    kinds = (Attribute("smile", "continuous"), Attribute("glasses", "binary"), Attribute("city", "categorical", ("a",)))
    monkeypatch.setattr(latent_tables, "attributes_of", lambda trained: kinds)
    assert kept_attributes(trained, "smile", ("all",)) == ["glasses"]
    with pytest.raises(UserError, match="--keep=city has categories"):
        kept_attributes(trained, "smile", ("city",))
    with pytest.raises(UserError, match="--attribute=city has categories"):
        kept_attributes(trained, "city", ())


def test_directions_are_kept_as_json(trained, workdir):
    from facevae_jax.generation.directions import direction_of

    direction = direction_of(trained, "glasses", method="regression", keep=("smile", "turn"))
    (path,) = (workdir / "directions").rglob("glasses-regression-keeping-smile-turn.json")
    saved = json.loads(path.read_text())
    assert set(saved) >= {"raw_norm", "counts", "score", "std", "vector", "kept"}
    assert sum(saved["counts"]) == 165
    again = direction_of(trained, "glasses", method="regression", keep=("smile", "turn"))
    np.testing.assert_array_equal(again.vector, direction.vector)
    assert again._replace(vector=None) == direction._replace(vector=None)
    assert len(direction_of(trained, "glasses", keep=("all",), method="mean").kept) == 22


def test_a_traversal_moves_one_dimension(trained, tmp_path):
    request = Request(output=str(tmp_path / "x.npz"), dimensions=(3, 0), alphas=(-1.0, 0.0, 2.0))
    verbs.traverse(trained, request)
    faces = np.load(tmp_path / "x.npz")["arr_0"].reshape(2, 3, SIDE, SIDE, 3)
    latents = np.tile(trained.mean_latent, (2, 3, 1))
    deviations = np.sqrt(np.diag(np.asarray(trained.moments.covariance)))
    for row, dimension in enumerate((3, 0)):
        latents[row, :, dimension] += deviations[dimension] * np.array([-1, 0, 2])
    assert np.abs(faces.reshape(-1, SIDE, SIDE, 3).astype(int) - trained.decode(latents.reshape(6, 8))).max() <= 1
    message = verbs.traverse(trained, Request(output=str(tmp_path / "y.png"), count=2))
    assert f"dimensions {', '.join(map(str, sheets.strongest_dimensions(trained)[:2]))}," in message


def test_encoding_writes_latents_with_names_and_labels(trained, originals, photographs, tmp_path):
    verbs.encode(trained, Request(output=str(tmp_path / "x.npz")))
    with np.load(tmp_path / "x.npz", allow_pickle=False) as table:
        np.testing.assert_allclose(table["mean"], trained.encode(originals).mean, atol=1e-5)
        assert table["names"][3] == "validation_3"
        names = table["attribute_names"].tolist()
        assert table["attributes"].shape == (37, 23)
        assert set(np.unique(table["attributes"][:, names.index("glasses")])) <= {0.0, 1.0}
    verbs.encode(trained, Request(output=str(tmp_path / "y.npz"), images=tuple(photographs), posterior="sample"))
    with np.load(tmp_path / "y.npz", allow_pickle=False) as table:
        assert table["names"].tolist() == photographs
        assert np.abs(table["mean"] - trained.encode(originals[:4]).mean).max() > 0.01


def test_latents_as_parquet(trained, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `parquet` is not installed")
    verbs.encode(trained, Request(output=str(tmp_path / "x.parquet")))
    table = parquet.read_table(tmp_path / "x.parquet")
    expected = latent_tables.encode_split(trained, "validation")
    np.testing.assert_array_equal(np.stack(table["mean"].to_pylist()).astype(np.float32), expected.mean)
    np.testing.assert_allclose(table["smile"].to_numpy(), expected.labels.column("smile"))


def test_a_label_that_is_called_as_another_column_is_told(trained, tmp_path):
    pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    table = latent_tables.encode_split(trained, "validation")
    attributes = (table.labels.attributes[0]._replace(name="mean"), *table.labels.attributes[1:])
    with pytest.raises(UserError, match="'mean'"):
        latent_tables.write_parquet(
            tmp_path / "x.parquet", table._replace(labels=table.labels._replace(attributes=attributes))
        )
    assert not list(tmp_path.iterdir())


def test_kept_latents_that_are_damaged_are_made_anew(trained, workdir):
    expected = latent_tables.encode_split(trained, "validation").mean
    path = workdir / "latents" / f"validation_{latent_tables.identity(trained)}.npz"
    path.write_bytes(path.read_bytes()[:-100])
    np.testing.assert_array_equal(latent_tables.encode_split(trained, "validation").mean, expected)


@pytest.mark.parametrize(
    ("verb", "request_", "mentioned"),
    [
        ("edit", {}, "--attribute is missing"),
        ("edit", {"attributes": ("smyle",)}, "did you mean smile"),
        ("edit", {"attributes": ("SMILE",)}, "did you mean smile"),
        ("edit", {"attributes": ("smile",), "keep": ("gender",)}, "--keep=gender"),
        ("edit", {"attributes": ("smile",), "keep": ("smile",)}, "--keep=smile"),
        ("edit", {"attributes": ("smile",), "alphas": (0.0, 40.0)}, "--alpha=40"),
        ("edit", {"attributes": ("smile",), "alphas": (float("nan"),)}, "--alpha=nan"),
        ("traverse", {"dimensions": (8,)}, "--dimensions=8"),
        ("reconstruct", {"rows": (37,)}, "--rows=37"),
        ("reconstruct", {"images": ("/nowhere/x.png",)}, "/nowhere/x.png does not exist"),
        ("sample", {"count": 20_000}, "20,000 pictures"),
        ("interpolate", {"count": 2, "steps": 60_000, "output": "x.npz"}, "120,002 pictures are more than 100,000"),
        ("interpolate", {"count": 1, "steps": 10_001, "loop": True}, "20,002 pictures: one grid"),
        ("sample", {"output": "..", "format": "png"}, "--output='..'"),
        ("sample", {"output": "x.jpg"}, "must end in .png"),
        ("sample", {"output": "x.png", "format": "npz"}, "must end in .npz"),
        ("sample", {"output": "x.gif"}, "--format=gif"),
        ("encode", {"output": "x.csv"}, ".parquet"),
    ],
)
def test_mistakes_are_told(trained, tmp_path, monkeypatch, verb, request_, mentioned):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=mentioned):
        verbs.VERBS[verb](trained, Request(**request_))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_image_is_told(trained, tmp_path):
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(UserError, match=r"x\.png cannot be read: cannot identify a PNG, JPEG or WEBP image"):
        verbs.reconstruct(trained, Request(output=str(tmp_path / "y.png"), images=(str(tmp_path / "x.png"),)))


@pytest.mark.parametrize("shape", [(2, 64, 64, 3), (2, SIDE, SIDE), (2, SIDE, SIDE, 1)])
def test_images_of_another_resolution_are_told(trained, shape):
    with pytest.raises(UserError, match=r"takes \[n, 32, 32, 3\]"):
        trained.encode(np.zeros(shape, np.uint8))


def test_arrays_of_another_kind_are_told(trained):
    with pytest.raises(UserError, match="floats from 0 to 1"):
        trained.encode(np.full((1, SIDE, SIDE, 3), 7.0))
    with pytest.raises(UserError, match=r"\[n, 8\]"):
        trained.decode(np.zeros((3, 9)))
    with pytest.raises(UserError, match="not finite"):
        trained.decode(np.full((1, 8), np.nan))


def test_photographs_are_cropped_as_in_training(tmp_path):
    random = np.random.default_rng(0)
    aligned = random.integers(0, 255, (218, 178, 3), np.uint8)
    Image.fromarray(aligned).save(tmp_path / "celeba.png")
    Image.fromarray(aligned[35:183, 15:163]).save(tmp_path / "square.png")
    wide = random.integers(0, 255, (40, 100, 3), np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide[:, 30:70]).save(tmp_path / "middle.png")
    read = facevae_jax.read_faces(tmp_path, resolution=SIDE)
    assert [pathlib.Path(name).stem for name in read.names] == ["celeba", "middle", "square", "wide"]
    np.testing.assert_array_equal(read.images[0], read.images[2])
    np.testing.assert_array_equal(read.images[1], read.images[3])
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # lies on its side, as cameras store portraits
    Image.fromarray(np.rot90(aligned)).save(tmp_path / "lying.png", exif=turned)
    lying = facevae_jax.read_faces(tmp_path / "lying.png", resolution=SIDE)
    np.testing.assert_array_equal(lying.images[0], read.images[0])


def test_a_run_that_was_not_evaluated_has_no_gaussian(trained):
    import copy

    fresh = copy.copy(trained)
    fresh.moments = trained.moments.replace(images=np.zeros(()))
    with pytest.raises(UserError, match="evaluated once"):
        fresh.sample(2, prior="gaussian")


def test_the_data_need_not_be_there_to_sample(workdir, tmp_path):
    import shutil

    shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("latents", "directions", "priors"))
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["data"] |= {"name": "lost", "data_dir": str(tmp_path)}
    path.write_text(json.dumps(config))
    moved = facevae_jax.load(tmp_path / "run")
    assert moved.sample(3).shape == (3, SIDE, SIDE, 3)
    with pytest.raises(UserError, match="'lost'"):
        verbs.edit(moved, Request(output=str(tmp_path / "x.png"), attributes=("smile",)))


def test_the_command(workdir, tmp_path):
    result = run_module(
        "facevae_jax.generate",
        "edit",
        f"--workdir={workdir}",
        "--attribute=smile",
        "--alpha=-1,0,1.5",
        "--count=2",
        f"--output={tmp_path / 'x.png'}",
    )
    assert result.returncode == 0, result.stderr
    assert cells(tmp_path / "x.png").shape[:2] == (2, 3)
    for flags, mentioned in (
        (["smple", f"--workdir={workdir}"], ["smple", "sample"]),
        (["sample"], ["--workdir"]),
        (["sample", f"--workdir={tmp_path}"], [str(tmp_path)]),
        (["edit", f"--workdir={workdir}", "--alpha=x"], ["--alpha"]),
    ):
        assert_one_line_error(run_module("facevae_jax.generate", *flags), *mentioned)


def test_a_workdir_of_another_kind_is_told(workdir, tmp_path):
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["kind"] = "diffusion"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.model\.kind"):
        facevae_jax.load(tmp_path)


def test_a_run_without_labels_is_told(trained, monkeypatch):
    monkeypatch.setattr(latent_tables, "attributes_of", lambda trained: ())
    with pytest.raises(UserError, match="no labels"):
        verbs.edit(trained, Request(attributes=("smile",)))
