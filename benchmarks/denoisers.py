"""What a careful user would do to a decoded height map: the baselines of `heights.py`, tuned by the truth.

* `STANDARD`: Gaussian, total variation, wavelets and non-local means of scikit-image, each over a small grid.
* `tile_dct`: overlapping tiles, thresholded with the noise that the frame model predicts.
* `oracle`: no denoiser, but how near linear filtering can come.

Maps are float32 [H, W] in nm. Taking the smooth part off before (`smooth_part`) makes every one of them stronger: a
slope costs `tile_dct` coefficients in every tile, and hides from non-local means that two flat patches are alike.
"""

from collections.abc import Callable

import numpy as np
from scipy.fft import dctn, idctn
from scipy.ndimage import gaussian_filter, uniform_filter
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, denoise_wavelet

TUNED_ON = 512  # side of the central part that the grids are searched on, px


def rmse(image: np.ndarray, truth: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(image - truth, dtype=np.float64))))


def smooth_part(height: np.ndarray, degree: int = 4, stride: int = 8) -> np.ndarray:
    """Least-squares polynomial of total degree `degree`, twice: outliers of the first fit (3 MAD) do not count."""
    y, x = (np.linspace(-1, 1, n) for n in height.shape)
    orders = [(i, j) for i in range(degree + 1) for j in range(degree + 1 - i)]
    rows, columns = np.polynomial.chebyshev.chebvander(y, degree), np.polynomial.chebyshev.chebvander(x, degree)
    part = height[::stride, ::stride].astype(np.float64).ravel()
    model = np.stack([np.outer(rows[::stride, i], columns[::stride, j]).ravel() for i, j in orders], axis=1)
    used = np.isfinite(part)
    for _ in range(2):
        found = np.linalg.lstsq(model[used], part[used], rcond=None)[0]
        error = np.abs(part - model @ found)
        used = error <= 3 * np.median(error[used])
    table = np.zeros((degree + 1, degree + 1))
    table[tuple(np.transpose(orders))] = found
    return (rows @ table @ columns.T).astype(np.float32)


# Name -> (denoiser of (image, its noise, strength), strengths). Images lie in [-1, 1], as scikit-image wants them.
STANDARD: dict[str, tuple[Callable[[np.ndarray, float, float], np.ndarray], tuple[float, ...]]] = {
    "gaussian": (
        lambda image, noise, s: gaussian_filter(image, s, mode="reflect"),
        (0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.8),
    ),
    "total_variation": (
        lambda image, noise, s: denoise_tv_chambolle(image, weight=s * noise),
        (0.3, 0.5, 0.7, 0.85, 1, 1.4),
    ),
    "wavelet": (
        lambda image, noise, s: denoise_wavelet(image, sigma=s * noise, method="BayesShrink", rescale_sigma=False),
        (0.7, 1, 1.3, 1.7, 2.2),
    ),
    "nl_means": (
        lambda image, noise, s: denoise_nl_means(image, 5, 6, h=s * noise, sigma=noise, fast_mode=True),
        (0.7, 0.9, 1.2, 1.5, 2),
    ),
}


def standard(name: str, image: np.ndarray, noise: float, strength: float) -> np.ndarray:
    """`image` in nm with `noise` (nm), denoised."""
    unit = np.float32(max(float(np.abs(image).max()), 1e-6))
    return STANDARD[name][0](image / unit, noise / unit, strength).astype(np.float32) * unit


def tuned(name: str, image: np.ndarray, truth: np.ndarray, noise: float) -> tuple[np.ndarray, float]:
    """The whole `image` by the denoiser `name`, and its strength: the one that is best on the central part."""
    corner = [max(0, (n - TUNED_ON) // 2) for n in image.shape]
    part = tuple(slice(c, c + TUNED_ON) for c in corner)
    strength = min(STANDARD[name][1], key=lambda s: rmse(standard(name, image[part], noise, s), truth[part]))
    return standard(name, image, noise, strength), strength


def tile_dct(image: np.ndarray, sigma: np.ndarray, size: int, shifts: int = 16, threshold: float = 3.0) -> np.ndarray:
    """Cycle-spun hard thresholding of tiles of `size` px in the DCT, at `threshold` standard errors of a tile's noise.

    sigma: noise of every pixel, [H, W]. The estimates of `shifts` (a square) tilings are averaged with weights
    1 / (coefficients kept x variance). Sources: R. Coifman and D. Donoho, Translation-Invariant De-Noising (1995); O.
    Guleryuz, IEEE Trans. Image Process. 16 (2007) 3020 (weights).
    """
    step = round(size / np.sqrt(shifts))
    shape = tuple(-(-(n + size) // size) * size for n in image.shape)
    pads = [(size, m - n) for m, n in zip(shape, image.shape, strict=True)]
    # A pixel without fringes knows nothing; a finite noise keeps its tile's weight above zero.
    variance = np.square(np.minimum(sigma, 100 * np.median(sigma)), dtype=np.float32)
    image, variance = (np.pad(a.astype(np.float32), pads, "symmetric") for a in (image, variance))
    total, weights = np.zeros_like(image), np.zeros_like(image)

    def tiled(a: np.ndarray) -> np.ndarray:
        return a.reshape(shape[0] // size, size, shape[1] // size, size).swapaxes(1, 2)

    for y in range(0, size, step):
        for x in range(0, size, step):
            there = slice(y, y + shape[0]), slice(x, x + shape[1])
            spectrum = dctn(tiled(image[there]), axes=(2, 3), norm="ortho")
            noise = tiled(variance[there]).mean((2, 3), keepdims=True)
            keep = np.square(spectrum) > threshold**2 * noise
            keep[..., 0, 0] = True
            weight = 1 / (keep.sum((2, 3), keepdims=True, dtype=np.float32) * noise)
            estimate = idctn(spectrum * keep, axes=(2, 3), norm="ortho") * weight
            total[there] += estimate.swapaxes(1, 2).reshape(shape)
            weights[there] += np.broadcast_to(weight, estimate.shape).swapaxes(1, 2).reshape(shape)
    inside = slice(size, size + image.shape[0] - sum(pads[0])), slice(size, size + image.shape[1] - sum(pads[1]))
    return total[inside] / weights[inside]


def best_tile_dct(image: np.ndarray, sigma: np.ndarray, truth: np.ndarray, shifts: int) -> np.ndarray:
    """`tile_dct` with the size of tile, 8 or 16 px, that comes nearest the truth."""
    return min((tile_dct(image, sigma, size, shifts) for size in (8, 16)), key=lambda found: rmse(found, truth))


def oracle(image: np.ndarray, truth: np.ndarray, side: int = 64) -> np.ndarray:
    """Wiener filters that are told the truth's power spectrum: that of the whole picture, or each block's own (averaged
    over 3 x 3 frequencies), whichever comes nearer the truth.

    Blocks of `side` px overlap by half under a Hann window. Source: N. Wiener, Extrapolation, Interpolation, and
    Smoothing of Stationary Time Series (1949).
    """
    profile = np.sqrt(np.hanning(side + 1)[:side])
    window = np.outer(profile, profile)
    pads = [(side // 2, side + -n % (side // 2)) for n in image.shape]
    padded, known = (np.pad(a.astype(np.float64), pads, "symmetric") for a in (image, truth))
    corners = [(y, x) for y in range(0, padded.shape[0] - side + 1, side // 2)
               for x in range(0, padded.shape[1] - side + 1, side // 2)]  # fmt: skip
    blocks = [np.stack([a[y : y + side, x : x + side] for y, x in corners]) for a in (padded, known)]
    means = blocks[0].mean((1, 2), keepdims=True)
    noisy, clean = (np.fft.fft2((each - means) * window) for each in blocks)
    power, noise = np.abs(clean) ** 2, (np.abs(noisy - clean) ** 2).mean(0)
    found = []
    for spectrum in (power.mean(0), uniform_filter(power, (0, 3, 3), mode="wrap")):
        total, weights = np.zeros_like(padded), np.zeros_like(padded)
        filtered = np.fft.ifft2(noisy * (spectrum / (spectrum + noise + 1e-30))).real + means * window
        for (y, x), each in zip(corners, filtered * window, strict=True):
            total[y : y + side, x : x + side] += each
            weights[y : y + side, x : x + side] += window**2
        inside = tuple(slice(before, before + n) for (before, _), n in zip(pads, image.shape, strict=True))
        found.append((total[inside] / weights[inside]).astype(np.float32))
    return min(found, key=lambda each: rmse(each, truth))
