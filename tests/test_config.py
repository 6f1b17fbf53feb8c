import pytest
from hypothesis import given
from hypothesis import strategies as st

from facevae_jax import models
from facevae_jax.config import DataConfig, RunConfig, check_overrides, describe_settings
from facevae_jax.core.settings import defaults, flatten
from facevae_jax.models import vae

LOGISTIC = {"likelihood": "discretized_logistic"}
DEEP = {"model": {"kind": "hierarchical"}, "data": {"resolution": 32}}


@given(st.integers(min_value=-5, max_value=5000))
def test_resolution_is_a_power_of_two_from_32_to_1024(resolution):
    if resolution in (32, 64, 128, 256, 512, 1024):
        filters = RunConfig(data=DataConfig(resolution=resolution)).model.stage_filters(resolution)
        assert resolution // 2 ** len(filters) == 4
    else:
        with pytest.raises(ValueError, match=rf"config\.data\.resolution={resolution} .*32 to 1024"):
            DataConfig(resolution=resolution)


@pytest.mark.parametrize(
    ("model", "resolution", "expected"),
    [
        (vae.Config(), 64, (32, 64, 128, 256)),
        (vae.Config(), 128, (32, 64, 128, 256, 256)),
        (vae.Config(stages=2), 128, (32, 64)),
        (vae.Config(base_filters=16, max_filters=32), 64, (16, 32, 32, 32)),
        (vae.Config(filters=(32, 64, 64, 64)), 128, (32, 64, 64, 64)),
    ],
)
def test_stages_follow_the_resolution_or_are_set(model, resolution, expected):
    assert model.stage_filters(resolution) == expected


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": {"resolutoin": 64}}, TypeError, r"config\.data\.resolutoin is unknown"),
        ({"model": 3}, TypeError, r"config\.model is of type int: .* ConfigDict"),
        ({"data": {"data_dir": ""}}, ValueError, r"config\.data\.data_dir=''"),
        ({"model": {"latent_dim": 20_000}}, ValueError, r"config\.model\.latent_dim=20000 .* at most 16384"),
        ({"train": {"steps_per_dispatch": 2**31}}, ValueError, r"config\.train\.steps_per_dispatch=.* below"),
        ({"optimiser": {}}, TypeError, r"config\.optimiser is unknown"),
        ({"model": {"latent_dim": 0}}, ValueError, r"config\.model\.latent_dim=0 .* positive"),
        ({"model": {"latent_dim": 2.5}}, TypeError, r"config\.model\.latent_dim=2\.5 must be of type int"),
        ({"model": {"normalization": "layer"}}, ValueError, r"normalization='layer' .* batch, group, none"),
        ({"model": {"filters": (8,) * 6}}, ValueError, r"config\.model\.filters=.* at most 5 stages"),
        ({"model": {"filters": (8, 8), "stages": 3}}, ValueError, r"config\.model\.stages=3"),
        ({"model": {"dropout_rate": 1.0}}, ValueError, r"config\.model\.dropout_rate=1\.0"),
        ({"objective": {"likelihood": "l1"}}, ValueError, r"likelihood='l1' .* mse, gaussian"),
        ({"train": {"batch_size": True}}, TypeError, r"config\.train\.batch_size=True"),
        ({"train": {"learning_rate": float("nan")}}, ValueError, r"config\.train\.learning_rate=nan"),
        ({"train": {"tensorboard": 1}}, TypeError, r"config\.train\.tensorboard=1"),
        ({"train": {"accumulation": 3}}, ValueError, r"accumulation=3 .*config\.train\.batch_size=128"),
        # What a kind of model or a likelihood cannot do.
        ({"model": {"kind": "pca"}, "train": {"steps": 100}}, ValueError, r"train\.steps=100"),
        ({"model": {"kind": "pca"}, "train": {"ema_decay": 0.9}}, ValueError, r"train\.ema_decay=0\.9"),
        ({"model": {"kind": "pca"}, "objective": {"likelihood": "gaussian"}}, ValueError, "likelihood='gaussian'"),
        ({"model": {"kind": "pca"}, "objective": LOGISTIC}, ValueError, "likelihood='discretized_logistic'.*pca"),
        ({"model": {"kind": "autoencoder"}, "objective": {"kl_weight": 4.0}}, ValueError, r"kl_weight=4\.0"),
        ({"model": {"kind": "autoencoder"}, "objective": {"free_bits": 1.0}}, ValueError, r"free_bits=1\.0"),
        ({"model": {"kind": "autoencoder_kl", "latent_channels": 2000}}, ValueError, "latent_channels=2000"),
        ({"data": {"dequantize": True}, "objective": LOGISTIC}, ValueError, r"data\.dequantize=True"),
        ({"objective": {"mixture_components": 5}}, ValueError, r"objective\.mixture_components=5"),
        ({"objective": {"kl_weights": "8:2"}}, ValueError, r"objective\.kl_weights='8:2' .* empty"),
        (
            {"objective": {"kl_weights": "8:-2"}},
            ValueError,
            r"objective\.kl_weights='8:-2' .* pairs of different resolutions such as",
        ),
        ({"objective": {"kl_weights": "8:2,8:3"}}, ValueError, "of different resolutions such as"),
        (DEEP | {"objective": {"kl_weights": "12:2"}}, ValueError, r"kl_weights='12:2' .* 1, 4, 8"),
    ],
)
def test_bad_settings_are_named(change, error, message):
    with pytest.raises(error, match=message):
        RunConfig.from_config_dict(change)


def test_unknown_overrides_get_a_suggestion():
    check_overrides(["--config=configs/x.py", "--config.data.resolution=64", "--workdir=x"])
    with pytest.raises(TypeError, match=r"--config\.model\.latent_dims is unknown.*--config\.model\.latent_dim\b"):
        check_overrides(["--config.model.latent_dims=3"])


@pytest.mark.parametrize(("kind", "head"), [("vae", "transposed"), ("autoencoder_kl", "patch")])
def test_a_saved_config_without_a_head_means_the_one_that_there_was(kind, head):
    saved = RunConfig(model=models.config_class(kind)()).to_dict()
    assert RunConfig.from_saved(saved).model.head == "nearest"
    del saved["model"]["head"]
    assert RunConfig.from_saved(saved).model.head == head
    assert RunConfig.from_config_dict(saved).model.head == "nearest"  # a config file of one's own


def test_help_has_every_setting_with_its_default():
    text = describe_settings()
    everything = RunConfig().to_dict()
    everything["model"] = {name: v for kind in models.KINDS for name, v in defaults(models.config_class(kind)).items()}
    for key in flatten(everything, "config."):
        assert f"--{key}=" in text
    assert "--config.train.learning_rate=5e-4\n" in text
    assert "positive" not in text  # no code of the checks
