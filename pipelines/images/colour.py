"""From whatever the decoder made to the RGB that a person would see.

Transparent pixels lie on white, as on the page that a picture is sent from; colours in another space than sRGB are
brought into it, as a screen would show them.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from pipelines.images.header import Header, Unreadable

WHITE = (255, 255, 255)
# Where a profile begins to say for which colours it is.
_SPACES = {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}


def as_seen(image: Image.Image, header: Header) -> Image.Image:
    """RGB of the same size, not yet turned."""
    image, alpha = _plain(image, header)
    opacity = alpha if alpha is not None else _opacity(image, header)
    rgb = _in_srgb(image, header.profile)
    if opacity is not None:
        page = Image.new("RGB", rgb.size, WHITE)
        page.paste(rgb, mask=opacity)
        rgb = page
    if header.frame is not None and header.frame != (0, 0, *rgb.size):
        page = Image.new("RGB", rgb.size, WHITE)
        page.paste(rgb.crop(header.frame), header.frame)
        rgb = page
    return rgb


def _plain(image: Image.Image, header: Header) -> tuple[Image.Image, Image.Image | None]:
    """The picture in L, RGB or CMYK, and how opaque it is where it says so."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and header.format == "PNG"):
        return _narrowed(image, header)
    if mode in ("I", "F"):
        raise Unreadable(
            "has samples of 32 bits, or signed ones, of which nobody knows how bright they are; send 8 or 16"
        )
    if mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif mode in ("LA", "La", "PA", "RGBa"):
        image = image.convert("RGBA")
    elif mode == "1":
        image = image.convert("L")
    elif mode not in ("L", "RGB", "RGBA", "CMYK"):
        image = image.convert("RGB")  # YCbCr, LAB, RGBX, HSV
    if image.mode != "RGBA":
        return image, None
    alpha = image.getchannel("A")
    return image.convert("RGB"), None if alpha.getextrema() == (255, 255) else alpha


def _narrowed(image: Image.Image, header: Header) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey, of which the upper half is seen; what is exactly of the transparent colour is not."""
    wide = np.asarray(image)
    grey = (wide >> 8).astype(np.uint8)
    if header.inverted:
        grey = ~grey
    alpha = None
    if header.transparent:
        alpha = _mask(wide == header.transparent[0])
    return Image.fromarray(grey), alpha


def _opacity(image: Image.Image, header: Header) -> Image.Image | None:
    """How opaque a PNG with one transparent colour is: not at all there, wholly elsewhere."""
    if not header.transparent:
        return None
    shown = np.asarray(image)
    # As the decoder gives the samples: 16 bits lose their lower half, fewer than 8 are spread over all of a byte.
    spread = [
        sample >> 8 if header.depth == 16 else sample * 255 // (2**header.depth - 1) for sample in header.transparent
    ]
    same = shown == spread[0] if shown.ndim == 2 else (shown == np.array(spread)).all(axis=-1)
    return _mask(same)


def _mask(empty: npt.NDArray[np.bool_]) -> Image.Image:
    return Image.fromarray((~empty).astype(np.uint8) * np.uint8(255))


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """A profile that is broken, or not for these colours, says nothing."""
    if profile[36:40] == b"acsp" and profile[16:20] == _SPACES[image.mode]:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in (source.profile.profile_description or ""):
                target = ImageCms.createProfile("sRGB")
                seen = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
                if seen is not None:
                    return seen
        except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
            pass
    return image if image.mode == "RGB" else image.convert("RGB")
