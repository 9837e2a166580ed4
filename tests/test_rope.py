"""Rotary positions and their stretching, against the papers' formulas written down once more."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.model.config import LinearScaling, Llama3Scaling, NtkScaling, YarnScaling
from llm_jax.model.rope import angles, frequencies, rotate
from tests.small import CFG, mesh_of

C, THETA = 64, 1e4
PLAIN = THETA ** -(np.arange(0, C, 2) / C)


def turned(x: np.ndarray, positions: np.ndarray, scaling=None, theta: float = THETA) -> np.ndarray:
    """Vectors [T, C] turned at their positions."""
    cfg = CFG.model_copy(update={"d_head": x.shape[-1], "rope_scaling": scaling})
    with jax.set_mesh(mesh_of()):
        function = jax.jit(lambda x, p: rotate(x, angles(p, theta, cfg)))
        return np.asarray(function(x[None, :, None], positions[None]))[0, :, 0]


def test_rotation_keeps_lengths_and_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 16)).astype(np.float32)
    near, far = np.arange(50), np.arange(50) + 900
    turned_q = {first: turned(np.tile(q, (50, 1)), at) for first, at in ((0, near), (900, far))}
    turned_k = {first: turned(np.tile(k, (50, 1)), at + 7) for first, at in ((0, near), (900, far))}
    np.testing.assert_allclose(np.linalg.norm(turned_q[900], axis=1), np.linalg.norm(q), rtol=1e-5)
    products = [np.sum(turned_q[first] * turned_k[first], axis=1) for first in (0, 900)]
    np.testing.assert_allclose(products[0], products[0][0], atol=2e-4)
    np.testing.assert_allclose(products[0], products[1], atol=2e-3)
    np.testing.assert_array_equal(turned(q, np.array([0])), q)
    assert abs(np.sum(turned(q, np.array([3])) * turned(k, np.array([5]))) - products[0][0]) > 0.1


def test_without_scaling_frequencies_are_those_of_the_paper():
    np.testing.assert_allclose(frequencies(THETA, C, None), PLAIN, rtol=1e-12)
    np.testing.assert_allclose(frequencies(5e5, 6, None), [1, 5e5 ** (-1 / 3), 5e5 ** (-2 / 3)], rtol=1e-12)


def test_linear_is_a_position_divided_by_the_factor():
    np.testing.assert_allclose(frequencies(THETA, C, LinearScaling(factor=4)), PLAIN / 4, rtol=1e-12)
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    at = np.arange(5)
    np.testing.assert_allclose(turned(x, 4 * at, LinearScaling(factor=4)), turned(x, at), atol=1e-5)


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest_by_the_factor():
    got = np.asarray(frequencies(THETA, C, NtkScaling(factor=8)))
    assert got[0] == 1
    assert got[-1] == pytest.approx(PLAIN[-1] / 8, rel=1e-12)
    np.testing.assert_allclose(got, (THETA * 8 ** (C / (C - 2))) ** -(np.arange(0, C, 2) / C), rtol=1e-12)
    assert frequencies(THETA, 2, NtkScaling(factor=8)) == [1]


def test_yarn_is_the_papers_ramp_over_rotations():
    """Peng et al. 2023: r(d) = L / wavelength, h = (1 - gamma(r)) theta / s + gamma(r) theta, with alpha and beta."""
    scaling = YarnScaling(factor=16, original_length=4096)
    wavelength = 2 * np.pi / PLAIN
    gamma = np.interp(4096 / wavelength, [1, 32], [0, 1])
    assert 0 < np.sum((gamma > 0) & (gamma < 1)) < C / 2
    got = frequencies(THETA, C, scaling)
    np.testing.assert_allclose(got, (1 - gamma) * PLAIN / 16 + gamma * PLAIN, rtol=1e-12)
    assert got[0] == 1 and got[-1] == pytest.approx(PLAIN[-1] / 16, rel=1e-12)


def test_yarn_sharpens_attention_by_its_temperature():
    """sqrt(1 / t) = 0.1 ln(s) + 1, on queries and on keys; it is in the gradient too."""
    scaling = YarnScaling(factor=16, original_length=4096)
    x = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    sharper = 0.1 * math.log(16) + 1
    lengths = np.linalg.norm(turned(x, np.array([0, 5, 70000]), scaling), axis=1)
    np.testing.assert_allclose(lengths, sharper * np.linalg.norm(x, axis=1), rtol=1e-5)
    cfg = CFG.model_copy(update={"d_head": 16, "rope_scaling": scaling})
    with jax.set_mesh(mesh_of()):
        by = angles(jnp.asarray([[0, 5, 700]]), THETA, cfg)
        y, pull_back = jax.vjp(lambda x: rotate(x, by), x[None, :, None])
        (dx,) = pull_back(y)
    np.testing.assert_allclose(dx[0, :, 0], sharper**2 * x, atol=1e-5)


def test_llama3_is_the_models_own_code():
    """Llama 3.1's apply_scaling: by wavelength, in its order of cases."""
    scaling = Llama3Scaling(factor=8, original_length=8192, low=1, high=4)
    expected = []
    for f in 5e5 ** -(np.arange(0, 128, 2) / 128):
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            expected.append(f)
        elif wavelength > 8192 / 1:
            expected.append(f / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * f / 8 + smooth * f)
    np.testing.assert_allclose(frequencies(5e5, 128, scaling), expected, rtol=1e-12)
    assert len(set(np.round(np.asarray(expected) / 5e5 ** -(np.arange(0, 128, 2) / 128), 6))) > 4


@pytest.mark.parametrize(
    "scaling",
    [
        LinearScaling(factor=1),
        NtkScaling(factor=1),
        YarnScaling(factor=1, original_length=2048),
        Llama3Scaling(factor=1),
    ],
    ids=lambda scaling: scaling.name,
)
def test_a_factor_of_one_changes_nothing(scaling):
    np.testing.assert_allclose(frequencies(THETA, C, scaling), PLAIN, rtol=1e-15)
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    np.testing.assert_allclose(turned(x, np.arange(5) * 100, scaling), turned(x, np.arange(5) * 100), atol=1e-5)


def test_channels_of_a_pair_are_half_a_head_apart():
    x = np.zeros((1, 8), np.float32)
    x[0, 1] = 1
    expected = np.zeros(8)
    angle = 3 * THETA ** (-1 / 4)
    expected[1], expected[5] = math.cos(angle), math.sin(angle)
    np.testing.assert_allclose(turned(x, np.array([3]))[0], expected, atol=1e-6)
