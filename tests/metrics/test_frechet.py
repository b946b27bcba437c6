"""The Fréchet distance against closed forms, SciPy's matrix square root, and its invariances."""

import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from dmd.metrics.frechet import Moments, frechet_distance, moments, resampled_distance


def gaussian(mean, cov):
    return Moments(torch.as_tensor(mean).double(), torch.as_tensor(cov).double(), 1000)


def random_features(seed, count, dim, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return scale * torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing + mixing[0]


def test_moments_are_numpy_s():
    numpy = pytest.importorskip("numpy")
    x = random_features(0, 50, 4)
    found = moments(x)
    assert found.count == 50
    torch.testing.assert_close(found.mean, torch.from_numpy(x.numpy().mean(0)))
    torch.testing.assert_close(found.cov, torch.from_numpy(numpy.cov(x.numpy().T)))


def test_float32_features_far_from_zero_keep_their_variance():
    x = (torch.tensor([[0.0], [1.0], [2.0]]) + 1e4).float()
    assert moments(x).cov.item() == pytest.approx(1.0, rel=1e-12)


def test_diagonal_gaussians_have_a_closed_form():
    a, b = torch.tensor([4.0, 9.0, 0.25]), torch.tensor([1.0, 16.0, 0.0])
    mean = torch.tensor([1.0, -2.0, 3.0])
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found = frechet_distance(gaussian(mean, a.diag()), gaussian(torch.zeros(3), b.diag()))
    assert found == pytest.approx(expected.item(), rel=1e-12)


def test_two_dimensional_gaussians_that_do_not_commute():
    # tr (A B)^1/2 = sqrt(tr(A B) + 2 sqrt(det A det B)) for 2 x 2 matrices.
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]], dtype=torch.float64)
    root = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    expected = (a.trace() + b.trace() - 2 * root).item()
    assert frechet_distance(gaussian([0, 0], a), gaussian([0, 0], b)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dim", [3, 64])
def test_equals_scipy_s_matrix_square_root(dim):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = moments(random_features(1, 500, dim)), moments(random_features(2, 700, dim, 0.5))
    root = torch.from_numpy(linalg.sqrtm((a.cov @ b.cov).numpy()).real)
    expected = (a.mean - b.mean).square().sum() + (a.cov + b.cov - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("count", "scale"), [(500, 1.0), (40, 1.0), (40, 100.0)])
def test_a_set_is_at_distance_zero_from_itself(count, scale):
    # With 40 samples in 64 dimensions the covariance is singular.
    found = moments(random_features(3, count, 64, scale))
    assert 0.0 <= frechet_distance(found, found) < 1e-12 * found.cov.trace()


def test_a_set_is_at_distance_zero_from_itself_in_absolute_terms():
    found = moments(random_features(3, 500, 64))
    assert frechet_distance(found, found) < 1e-6


@pytest.mark.parametrize("least", [1e-4, 1e-9, 1e-13, 0.0])
def test_nearly_singular_covariances_lose_nothing(least):
    """Commuting covariances in a rotated basis, whose distance is that of their eigenvalues' roots."""
    rotation = torch.linalg.qr(random_features(16, 40, 40)).Q
    a, b = torch.linspace(1, 2, 40).double(), torch.linspace(3, 1, 40).double()
    a[::3], b[::4] = least, least
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    both = [gaussian(torch.zeros(40), rotation @ v.diag() @ rotation.T) for v in (a, b)]
    assert frechet_distance(*both) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(both[0], both[0]) < 1e-12


@pytest.mark.parametrize("shift", [1.0, 1e-3, 1e-6, 0.0])
def test_well_conditioned_covariances_take_another_way_to_the_same_distance(monkeypatch, shift):
    """Down to distances that this way is too rough for; the closed form is of covariances that commute."""
    rotation = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(1)).double())[0]
    one = torch.linspace(1, 3, 96, dtype=torch.float64)
    two = (one.sqrt() + shift).square()
    a, b = (gaussian(torch.zeros(96), rotation @ d.diag() @ rotation.T) for d in (one, two))
    expected, decompositions, svd = 96 * shift**2, [], torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda x: decompositions.append(x) or svd(x))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8, abs=1e-12)
    assert len(decompositions) == (shift < 1e-2)


def test_singular_covariances_in_orthogonal_subspaces():
    a, b = torch.diag(torch.tensor([5.0, 0.0])), torch.diag(torch.tensor([0.0, 7.0]))
    assert frechet_distance(gaussian([0, 0], a), gaussian([0, 0], b)) == pytest.approx(12.0, rel=1e-12)


def test_a_constant_set_counts_as_a_point():
    point, cloud = moments(torch.ones(5, 3)), moments(random_features(4, 100, 3))
    expected = (cloud.mean - 1).square().sum() + cloud.cov.trace()
    assert frechet_distance(point, cloud) == pytest.approx(expected.item(), rel=1e-12)


def test_symmetry_and_invariance_to_rotation_and_shift():
    x, y = random_features(5, 200, 16), random_features(6, 300, 16)
    rotation = torch.linalg.qr(random_features(7, 16, 16)).Q
    distance = frechet_distance(moments(x), moments(y))
    assert frechet_distance(moments(y), moments(x)) == pytest.approx(distance, rel=1e-10)
    moved = frechet_distance(moments(x @ rotation + 3), moments(y @ rotation + 3))
    assert moved == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(moments(5 * x), moments(5 * y)) == pytest.approx(25 * distance, rel=1e-10)


def test_a_shift_adds_its_squared_length():
    x = random_features(8, 200, 8)
    assert frechet_distance(moments(x), moments(x + 2)) == pytest.approx(8 * 4, rel=1e-10)


@pytest.mark.parametrize(
    ("features", "sentence"),
    [
        (torch.zeros(1, 3), r"shape \(1, 3\): \(N, D\) with at least 2 rows"),
        (torch.zeros(5), r"shape \(5,\)"),
        (torch.tensor([[1.0], [float("nan")], [2.0]]), "sample 1 are not finite"),
        (torch.tensor([[1.0], [2.0], [float("inf")]]), "sample 2 are not finite"),
    ],
)
def test_bad_features_are_named(features, sentence):
    with pytest.raises(ValueError, match=sentence):
        moments(features)


def test_features_of_two_networks_are_refused():
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        frechet_distance(gaussian([0] * 3, torch.eye(3)), gaussian([0] * 4, torch.eye(4)))


@pytest.fixture
def cleanfid(monkeypatch):
    """clean-fid's own functions, also beside SciPy 1.18, which has taken away an argument that they give."""
    module = pytest.importorskip("cleanfid.fid")
    linalg = module.linalg
    if "disp" not in inspect.signature(linalg.sqrtm).parameters:
        old = types.SimpleNamespace(sqrtm=lambda a, disp=True: (linalg.sqrtm(a), 0.0) if not disp else linalg.sqrtm(a))
        monkeypatch.setattr(module, "linalg", old)
    return module


@pytest.mark.parametrize(("dim", "counts"), [(5, (300, 200)), (64, (1000, 800)), (192, (600, 500))])
def test_equals_clean_fid_s_on_the_same_features(cleanfid, dim, counts):
    a, b = random_features(10, counts[0], dim).float(), random_features(11, counts[1], dim, 0.7).float()
    expected = cleanfid.fid_from_feats(a.double().numpy(), b.double().numpy())
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-6)


WITHOUT_SCIPY = """
import sys

class Refusing:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "scipy":
            raise ImportError("there is no SciPy")

sys.meta_path.insert(0, Refusing())
import torch
from dmd.metrics.frechet import frechet_distance, moments
x = moments(torch.randn(100, 8, generator=torch.Generator().manual_seed(0)))
assert frechet_distance(x, x) < 1e-6 and "scipy" not in sys.modules
"""


def test_needs_no_scipy():
    """SciPy 1.18 broke the matrix square root of other packages; here a process that cannot import it."""
    subprocess.run([sys.executable, "-c", WITHOUT_SCIPY], cwd=Path(__file__).parents[2], check=True)


@pytest.mark.slow
def test_features_of_inception_s_dimensions_equal_clean_fid_s(cleanfid):
    """P8's 1e-6; its seconds are for `benchmarks.all`."""
    a, b = random_features(12, 2500, 2048), random_features(13, 2500, 2048, 0.9)
    both = moments(a), moments(b)
    found = frechet_distance(*both)
    assert found == pytest.approx(cleanfid.frechet_distance(*_numpy(both[0]), *_numpy(both[1])), rel=1e-6)
    assert frechet_distance(both[0], both[0]) < 1e-6


def _numpy(found):
    return found.mean.numpy(), found.cov.numpy()


@pytest.mark.parametrize(("count", "reference"), [(200, 300), (12, 300), (200, 12)])
def test_a_weighted_set_is_at_the_distance_of_its_repeated_samples(count, reference):
    x, real = random_features(14, count, 16), moments(random_features(15, reference, 16))
    weights = torch.bincount(
        torch.randint(count, (count,), generator=torch.Generator().manual_seed(0)), minlength=count
    )
    distance = resampled_distance(real, x)
    repeated = x.repeat_interleave(weights, 0)
    assert distance(weights.double()) == pytest.approx(frechet_distance(real, moments(repeated)), rel=1e-6)
    assert distance(torch.ones(count)) == pytest.approx(frechet_distance(real, moments(x)), rel=1e-6)
