"""Directions against latents whose making is known."""

import numpy as np
import pytest

from facevae_jax.core.errors import UserError
from facevae_jax.latents.directions import Labels, Whitening, cross_validate, fit_direction
from facevae_jax.latents.moments import moments_of

IMAGES, SIZE = 4000, 6


class World:
    """Latents z = A a + noise of unequal variances, for a binary label, one correlated with it, and a number."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        gender = (random.random(IMAGES) < 0.5).astype(float)
        smile = (random.random(IMAGES) < 0.2 + 0.6 * gender).astype(float)
        age = random.uniform(20, 60, IMAGES)
        self.pattern = random.normal(size=(SIZE, 3)) * [2, 2, 0.1]
        noise = random.normal(size=(IMAGES, SIZE)) * np.linspace(0.1, 2, SIZE)
        self.latents = (np.stack([smile, gender, age], 1) @ self.pattern.T + noise).astype(np.float32)
        self.log_variance = np.full((IMAGES, SIZE), -6.0, np.float32)
        self.whitening = Whitening.of(moments_of(self.latents, self.log_variance))
        self.smile, self.gender = Labels("smile", True, smile), Labels("gender", True, gender)
        self.age = Labels("age", False, age)

    def fit(self, labels: Labels, *keep: Labels, method: str = "mean"):
        return fit_direction(self.latents, self.whitening, labels, list(keep), method=method)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_mean_direction_is_the_difference_of_the_means(world):
    direction = world.fit(world.smile)
    with_it, without = (world.latents[world.smile.values == value].mean(0) for value in (1, 0))
    difference = (with_it - without).astype(np.float64)
    np.testing.assert_allclose(direction.vector * direction.raw_norm, difference, rtol=1e-3, atol=1e-3)
    assert direction.counts == (int(np.sum(world.smile.values == 0)), int(np.sum(world.smile.values == 1)))


@pytest.mark.parametrize("method", ["mean", "regression"])
@pytest.mark.parametrize("name", ["smile", "gender", "age"])
def test_alpha_counts_standard_deviations_of_the_latents_along_the_direction(world, method, name):
    direction = world.fit(getattr(world, name), method=method)
    drawn = world.latents + np.exp(-3.0) * np.random.default_rng(1).normal(size=world.latents.shape)
    assert direction.std == pytest.approx((drawn @ direction.vector).std(), rel=0.01)
    assert np.linalg.norm(direction.vector) == pytest.approx(1, abs=1e-6)
    edited = direction.edit(world.latents[0], [-1.0, 0.0, 2.5])
    np.testing.assert_array_equal(edited[1], world.latents[0])
    np.testing.assert_allclose(
        (edited - world.latents[0]) @ direction.vector, direction.std * np.array([-1, 0, 2.5]), rtol=1e-4, atol=1e-5
    )


def test_keeping_a_correlated_attribute_finds_what_belongs_to_the_first_alone(world):
    alone, kept = world.fit(world.smile), world.fit(world.smile, world.gender)
    truth, other = world.pattern[:, 0], world.pattern[:, 1]
    assert cosine(kept.vector, truth) > 0.99
    assert cosine(alone.vector, truth) < 0.95  # it has some of the other's in it
    assert cosine(alone.vector, truth + 0.6 * other) > 0.99  # as much as the other is more frequent with it
    assert kept.kept == ("gender",)


def test_an_orthogonal_direction_does_not_change_what_predicts_the_other(world):
    from sklearn.linear_model import LogisticRegression

    direction = world.fit(world.smile, world.gender, method="regression")
    whitened = world.whitening.whiten(world.latents)
    classifier = LogisticRegression(class_weight="balanced", max_iter=1000).fit(whitened, world.gender.values)
    step = world.whitening.whiten(direction.vector[None] * direction.std + world.whitening.mean)[0]
    normal = classifier.coef_[0]
    assert abs(normal @ step) < 0.01 * np.linalg.norm(normal) * np.linalg.norm(step)
    assert world.fit(world.smile, method="regression").vector @ direction.vector > 0.3


def test_scores_are_those_of_latents_that_were_not_fitted(world):
    assert world.fit(world.gender).score > 0.9
    design = np.column_stack([world.latents, np.ones(IMAGES)])
    left = world.age.values - design @ np.linalg.lstsq(design, world.age.values, rcond=None)[0]
    for method in ("mean", "regression"):  # the best line, which 4,000 latents of 6 numbers hardly over-fit
        assert world.fit(world.age, method=method).score == pytest.approx(
            1 - left.var() / world.age.values.var(), abs=0.02
        )
    random = np.random.default_rng(3)
    nonsense = Labels("nonsense", True, (random.random(IMAGES) < 0.3).astype(float))
    assert abs(world.fit(nonsense).score - 0.5) < 0.05  # a threshold between the classes' means: a coin
    assert world.fit(nonsense).chance == 0.5


def test_unknown_labels_are_left_out(world):
    values = world.smile.values.copy()
    values[::3] = np.nan
    direction = world.fit(world.smile._replace(values=values))
    assert sum(direction.counts) == np.isfinite(values).sum()
    assert cosine(direction.vector, world.fit(world.smile).vector) > 0.99


@pytest.mark.parametrize("method", ["mean", "regression"])
def test_labels_that_cannot_be_fitted_are_named(world, method):
    with pytest.raises(UserError, match="'constant'"):
        world.fit(Labels("constant", True, np.zeros(IMAGES)), method=method)
    with pytest.raises(UserError, match="keep=grin"):
        world.fit(world.smile, world.smile._replace(name="grin"), method=method)
    # A kept label that is the same wherever the edited one is known.
    other = Labels("other", True, (np.arange(IMAGES) % 2).astype(float))
    values = np.where(other.values == 0, world.smile.values, np.nan)
    with pytest.raises(UserError, match="'other'"):
        world.fit(world.smile._replace(values=values), other, method=method)


def test_a_dimension_that_carries_nothing_is_left_alone(world):
    """Its means hardly differ, so that a whitening by them alone would blow it up."""
    random = np.random.default_rng(4)
    means = np.concatenate([world.latents, 1e-3 * random.normal(size=(IMAGES, 1)).astype(np.float32)], axis=1)
    log_variance = np.concatenate([world.log_variance, np.zeros((IMAGES, 1), np.float32)], axis=1)
    latents = means + np.exp(0.5 * log_variance) * random.normal(size=means.shape)
    whitening = Whitening.of(moments_of(means, log_variance))
    whitened = whitening.whiten(latents)
    np.testing.assert_allclose(np.cov(whitened.T), np.eye(SIZE + 1), atol=0.1)
    for method in ("mean", "regression"):
        direction = fit_direction(latents, whitening, world.smile, [world.gender], method=method)
        assert abs(direction.vector[-1]) < 0.05


@pytest.mark.parametrize("binary", [False, True])
def test_a_label_that_varies_in_one_fold_alone_has_a_score(binary):
    """The other folds have nothing to learn from."""
    values = np.zeros(50)
    values[7] = 1.0
    score, chance = cross_validate(np.random.default_rng(0).normal(size=(50, 3)), values, binary=binary, method="mean")
    assert np.isfinite(score)
    assert score <= chance + 1e-9
