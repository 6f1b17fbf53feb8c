"""Why samples are poor, checkerboards, and which scores compare."""

import json
import shutil

import numpy as np
import pytest

from facevae_jax.core.errors import UserError
from facevae_jax.core.files import write_json
from facevae_jax.metrics import diagnosis, protocol, spectrum
from facevae_jax.reporting import write
from facevae_jax.reporting.runs import open_runs
from tests.conftest import run_module


def test_a_checkerboard_is_measured_as_it_was_added():
    random = np.random.default_rng(0)
    images = np.clip(random.normal(128, 20, (64, 32, 32, 3)), 0, 255).astype(np.uint8)
    assert spectrum.checkerboard([images]) == pytest.approx(1.0, abs=0.3)  # white noise
    grid = 10 * (-1.0) ** np.add.outer(np.arange(32), np.arange(32))
    added = np.clip(images + grid[None, :, :, None], 0, 255).astype(np.uint8)
    gray = images.astype(np.float64).mean(axis=3)
    power = np.square(np.abs(np.fft.fft2(gray - gray.mean(axis=(1, 2), keepdims=True)))).mean(axis=0)
    expected = (power[16, 16] + (10 * 32 * 32) ** 2) / power[12, 12]
    assert spectrum.checkerboard([added[:40], added[40:]]) == pytest.approx(expected, rel=0.05)


def colors(images):
    """Features: mean and spread of each color."""
    x = images.astype(np.float64)
    return np.concatenate([x.mean(axis=(1, 2)), x.std(axis=(1, 2))], axis=1)


def test_the_parts_of_a_distance_add_up_and_name_the_largest(trained):
    found = diagnosis.diagnose(trained, "validation", extract=colors, prior="standard", count=37)
    assert found["images"] == 18
    assert sum(found["parts"].values()) == pytest.approx(found["distances"]["prior"])
    assert found["parts"][found["largest"]] == max(found["parts"].values())
    assert found["remedy"] == diagnosis.REMEDIES[found["largest"]]


@pytest.mark.parametrize("guilty", ["decoder", "prior"])
def test_the_guilty_part_is_found(trained, monkeypatch, guilty):
    """A model that copies its images but for one fault."""
    pixels = np.asarray(trained.dataset.images("validation"))
    dark = np.zeros_like(pixels[:1])

    def decoded(codes):
        return pixels[: len(codes)] // (4 if guilty == "decoder" else 1)

    def decode_stream(batches):
        yield from map(decoded, batches)

    def sample_stream(count, **options):
        yield np.repeat(dark, count, axis=0) if guilty == "prior" else next(decode_stream([np.zeros((count, 8))]))

    monkeypatch.setattr(trained.inference, "decode_stream", decode_stream)
    monkeypatch.setattr(trained.inference, "reconstruct_stream", decode_stream)
    monkeypatch.setattr(trained, "sample_stream", sample_stream)
    found = diagnosis.diagnose(trained, "validation", extract=colors, prior="standard", count=36)
    assert found["largest"] == guilty


def test_features_without_a_network_see_blur_and_displacement():
    random = np.random.default_rng(0)
    smooth = random.integers(0, 256, (200, 8, 8, 3)).repeat(4, axis=1).repeat(4, axis=2)
    images = np.clip(smooth + random.normal(0, 20, (200, 32, 32, 3)), 0, 255).astype(np.uint8)
    features = diagnosis.layout_and_detail(images)
    distances = {
        name: diagnosis.frechet_distance(diagnosis.layout_and_detail(other), features[:100])
        for name, other in {
            "same": images[100:],
            "blurred": smooth[100:].astype(np.uint8),
            "darker": images[100:] // 2,
        }.items()
    }
    assert distances["same"] < min(distances["blurred"], distances["darker"])


def test_too_few_images_are_refused(trained):
    with pytest.raises(UserError, match="4 at least"):
        diagnosis.diagnose(trained, "validation", extract=colors, prior="standard", count=3)


def test_features_have_the_name_of_what_they_give():
    same, other = (
        protocol.named_features("f", lambda x, s=s: colors(x) * [1, 1, 1, s, 1, 1], resolution=32) for s in (1, 2)
    )
    assert same == protocol.named_features("f", colors, resolution=32)
    assert same != other


def test_scores_of_unlike_protocols_are_not_lined_up(trained, workdir, tmp_path):
    paths = [shutil.copytree(workdir, tmp_path / name) for name in ("one", "two", "three")]
    given = {"split": "validation", "count": 20, "prior": "gaussian", "features": "f 1"}
    for path, seed, distance in zip(paths, (0, 0, 7), (1.25, 2.5, 3.75), strict=True):
        of = protocol.protocol(trained, seed=seed, **given)
        write_json(path / "evaluation_validation.json", {"features": {"sample_frechet": distance, "protocol": of}})
    table, note = sorted(write.lined_up(open_runs(paths)), key=lambda block: type(block).__name__, reverse=True)
    assert table.rows == [["sample frechet", "1.25", "2.5"]]
    assert "seed is 0 and 7" in note.text
    assert "three" in note.text


def test_the_protocol_says_all_that_decides_a_score(trained):
    found = protocol.protocol(trained, split="validation", count=20, prior="flow", seed=3, features="f 1")
    keys = {"data", "resolution", "crop", "resize", "split", "images", "features", "prior", "temperature", "seed"}
    assert set(found) == keys
    assert protocol.differing([found, found | {"crop": "other"}]) == {"crop": ["drawn", "other"]}
    by_resolution = protocol.protocol(
        trained, split="validation", count=20, prior="flow", seed=3, features="f 1", temperature={1: 1.0, 8: 0.7}
    )
    assert not protocol.differing([by_resolution, json.loads(json.dumps(by_resolution))])


@pytest.mark.slow
def test_the_command(workdir, tmp_path):
    output = tmp_path / "scores.json"
    result = run_module(
        "facevae_jax.evaluate",
        *(f"--workdir={workdir}", "--diagnose", "--prior=gaussian", "--importance_samples=", f"--json={output}"),
    )
    assert result.returncode == 0, result.stderr
    record = json.loads(output.read_text())
    assert set(record["checkerboard"]) == {"originals", "reconstructions", "samples"}
    found = record["diagnosis"]
    assert found["protocol"]["features"].startswith("layout_and_detail ")
    assert found["remedy"] in result.stdout
