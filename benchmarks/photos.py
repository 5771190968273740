"""Images with the statistics of photographs, for benchmarks that need realistic JPEG files but no data set.

The spectra of photographs fall as 1 / f^1.2, and their channels are correlated. At JPEG quality 90 a file of 500 x 375
pixels then has about 96 kB; ImageNet's mean is 110 kB. File size matters because decoding time is proportional to it.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

DRAWN = 48  # an image takes 70 ms, and its copies decode at the same speed


def noise(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width) float with variance 1 and spectrum 1 / f^1.2."""
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = 1 / max(height, width)
    filtered = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / f**1.2, (height, width))
    return (filtered - filtered.mean()) / filtered.std()


def jpeg(width: int, height: int, seed: int, quality: int = 90) -> bytes:
    rng = np.random.default_rng(seed)
    shared = noise(height, width, rng)
    pixels = np.stack([118 + 53 * (shared + 0.3 * noise(height, width, rng)) for _ in range(3)], axis=-1)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def write(folder: Path, count: int, width: int = 500, height: int = 375) -> list[Path]:
    """Write `count` files into `folder`, the same every time; after DRAWN of them, copies of these."""
    paths = [folder / f"{i:05d}.jpg" for i in range(count)]
    drawn = [jpeg(width, height, i) for i in range(min(count, DRAWN))]
    for i, path in enumerate(paths):
        path.write_bytes(drawn[i % DRAWN])
    return paths
