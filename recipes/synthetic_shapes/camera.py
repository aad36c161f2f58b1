"""Light and lens: solid shading, darkness and lamps, glare, motion, exposure, noise, compression."""

from __future__ import annotations

import io

import numpy as np
from noise import axes, noise, resize
from PIL import Image, ImageFilter
from scipy import ndimage


def blurred(image: np.ndarray, radius: float) -> np.ndarray:
    """Blur an image `[H, W, 3]` in 0..1 by a Gaussian of `radius` pixels."""
    pixels = Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8))
    return np.asarray(pixels.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def soft(alpha: np.ndarray, radius: float) -> np.ndarray:
    """Blur a mask `[H, W]` in 0..1 widely, at reduced size."""
    h, w = alpha.shape
    step = max(1, int(radius / 2))
    small = np.clip(resize(alpha, max(2, h // step), max(2, w // step)), 0, 1)
    pixels = Image.fromarray((small * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius / step))
    return resize(np.asarray(pixels, np.float32) / 255, h, w)


def relief(rng: np.random.Generator, alpha: np.ndarray, light: float) -> np.ndarray:
    """Brightness `[H, W]` of a rounded body with this outline, lit from the direction `light`."""
    depth = rng.uniform(0.08, 0.3) * min(alpha.shape)
    padded = np.pad(alpha, int(depth) + 1)
    inner = slice(int(depth) + 1, -int(depth) - 1)
    height = soft(padded, depth) * depth
    gy, gx = np.gradient(height)
    slope = (-(gx * np.cos(light) + gy * np.sin(light)) * rng.uniform(0.3, 2.0))[inner, inner]
    shade = 1 - 0.5 * np.tanh(slope)
    if rng.random() < 0.5:  # darker towards the outline
        shade = shade * (1 - rng.uniform(0.1, 0.5) * (1 - np.clip(height[inner, inner] / depth, 0, 1)))
    return shade.astype(np.float32)


def moved(rng: np.random.Generator, image: np.ndarray, reach: int) -> np.ndarray:
    """Blur along one direction: motion of the camera or of the thing."""
    angle = rng.uniform(0, np.pi)
    steps = np.linspace(-reach / 2, reach / 2, max(3, min(reach, 9)))
    pad = reach + 1
    wide = np.pad(image, ((pad, pad), (pad, pad), (0, 0))[: image.ndim], mode="edge")
    h, w = image.shape[:2]
    total = np.zeros_like(image)
    for step in steps:
        y, x = pad + round(step * np.sin(angle)), pad + round(step * np.cos(angle))
        total += wide[y : y + h, x : x + w]
    return total / len(steps)


def dappled(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Add sunlight through leaves: patches whose hard edges belong to no object."""
    size = len(image)
    field = resize(noise(rng, size // 4, size // 4, (0.15, 0.8)), size, size)
    patch = 1 / (1 + np.exp(-(field - rng.uniform(-0.5, 1)) * rng.uniform(3, 12)))
    return image * (rng.uniform(0.35, 0.8) + rng.uniform(0.4, 0.9) * patch)[..., None]


def at_night(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Make a scene dark and bluish, with a few lamps."""
    size = len(image)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    light = np.full((size, size, 3), rng.uniform(0.1, 0.35), np.float32) * np.array([0.8, 0.9, 1.15], np.float32)
    for _ in range(rng.integers(0, 5)):
        cx, cy = rng.uniform(0, 1, 2)
        reach = rng.uniform(0.05, 0.4)
        spot = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / reach**2)[..., None]
        light = light + spot * rng.uniform(0.4, 1.2) * np.array([1.1, 1.0, rng.uniform(0.5, 0.9)], np.float32)
    return image * light


def glaring(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Add glare: a veil, a bright spot, a streak."""
    x, y = axes(len(image), len(image))
    cx, cy = rng.uniform(-1, 1, 2)
    distance = (x - float(cx)) ** 2 + (y - float(cy)) ** 2
    veil = rng.uniform(0.05, 0.35) * np.exp(-distance) + np.exp(-distance * rng.uniform(15, 200))
    if rng.random() < 0.5:
        along = x * float(np.cos(cx * 9)) + y * float(np.sin(cx * 9))
        veil = veil + 0.4 * np.exp(-((along - float(cx)) ** 2) * 600)
    return image + veil[..., None] * rng.uniform(0.7, 1, 3).astype(np.float32)


def photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Take a photograph of a scene `[size, size, 3]` in about 0..1; return uint8."""
    size = len(image)
    kind = rng.random()
    if kind < 0.14:
        image = dappled(rng, image)
    elif kind < 0.2:
        image = at_night(rng, image)
    if rng.random() < 0.5:  # uneven light, shadows of things outside the image
        light = resize(noise(rng, 16, 16, (0.1, 0.5)), size, size)
        if rng.random() < 0.3:
            light = np.tanh(light * 4)
        image = image * (1 + rng.uniform(0.03, 0.3) * light[..., None])
    if rng.random() < 0.3:
        x, y = axes(size, size)
        image = image * (1 - rng.uniform(0, 0.35) * (x * x + y * y)[..., None])
    if rng.random() < 0.04:
        image = glaring(rng, image)
    image = image * rng.normal(1, 0.05, 3).astype(np.float32)
    gray = image.mean(2, keepdims=True)
    saturation = 0.0 if rng.random() < 0.06 else rng.uniform(0.6, 1.5)
    # a camera sets its exposure by what it sees; highlights and shadows roll off rather than clip
    gain = np.clip(rng.uniform(0.22, 0.4) / (gray.std() + 1e-3), 0.6, 2.5)
    image = (gray - gray.mean()) * gain + (image - gray) * saturation * min(1.4, gain)
    image = image + np.clip(rng.normal(-0.06, 0.1), -0.25, 0.2)
    image = (0.5 + 0.5 * np.tanh(2 * image)).astype(np.float32)
    if rng.random() < 0.04:
        image = moved(rng, image, max(3, int(size * rng.uniform(0.01, 0.03))))
    if rng.random() < 0.25:
        image = blurred(image, rng.uniform(0.3, 1.0) * size / 384)
    if rng.random() < 0.4:  # sharpened, as cameras do
        image = image + rng.uniform(0.3, 1.2) * (image - blurred(image, 1.0))
    pixels = image * 255
    if rng.random() < 0.7:
        grain = rng.standard_normal((size, size, 3 if rng.random() < 0.5 else 1), np.float32)
        if rng.random() < 0.3:
            grain = 2.5 * ndimage.uniform_filter(grain, (2, 2, 0))
        pixels = pixels + grain * float(np.exp(rng.uniform(np.log(0.5), np.log(12))))
    photo = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.4:
        buffer = io.BytesIO()
        photo.save(buffer, "JPEG", quality=int(rng.integers(30, 90)))
        photo = Image.open(buffer)
    return np.asarray(photo)
