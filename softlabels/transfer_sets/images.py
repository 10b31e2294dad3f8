"""How does a picture file become pixels of one shape? Decoded, resized, cut out of its middle, always alike."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError, MissingExtraError, ShapeMismatchError, UnreadableSampleError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""What is taken for a picture, in small letters."""

MODES = ("RGB", "L")
LAYOUTS = ("chw", "hwc")


@dataclass(frozen=True, kw_only=True)
class PictureForm:
    """What pictures are brought to.

    Attributes:
        size: height and width of what is cut out of the middle; None takes pictures as they are, all of one shape.
        resize: the shorter side before that; None takes the least that the cut needs.
        mode: "RGB", or "L" for one channel of grey.
        layout: "chw" [channels, height, width], or "hwc"; a grey picture has a channel axis too.
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    mode: Literal["RGB", "L"] = "RGB"
    layout: Literal["chw", "hwc"] = "chw"

    def decode(self, source: Path | bytes, name: str) -> NDArray[np.uint8]:
        """The pixels of a picture, uint8 in the form's shape.

        Args:
            source: its file, or the file's contents.
            name: for messages.
        Raises:
            UnreadableSampleError: corrupt, cut, too large, or not to be had in 8 bits a channel.
        """
        image_module = _pillow()
        try:
            with image_module.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return self.pixels(image, name)
        except UnreadableSampleError:
            raise
        except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
            raise UnreadableSampleError(
                f"picture {name!r} cannot be decoded ({error}): restore it, or take it out of the transfer set",
                sample=name,
            ) from error

    def pixels(self, image: Any, name: str) -> NDArray[np.uint8]:
        """As `decode`, of a picture that Pillow has opened."""
        if image.mode.startswith(("I", "F")):
            raise UnreadableSampleError(
                f"picture {name!r} has more than 8 bits a channel (mode {image.mode}), which would be cut: keep such "
                "pictures as arrays, in npy, Zarr or HDF5",
                sample=name,
            )
        if "transparency" in image.info:
            image = image.convert("RGBA")
        image = self._cut(image if image.mode == self.mode else image.convert(self.mode))
        pixels_HWC: NDArray[np.uint8] = np.asarray(image).reshape(image.height, image.width, -1)
        return pixels_HWC if self.layout == "hwc" else np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))

    def _cut(self, image: Any) -> Any:
        if self.size is None:
            return image
        height, width = self.size
        # Sides and corners are rounded as torchvision's Resize and CenterCrop do, which most networks were tested with.
        if self.resize is None:
            scale = max(height / image.height, width / image.width)
            new = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        else:
            short, long = sorted((image.width, image.height))
            longer = int(self.resize * long / short)
            new = (self.resize, longer) if image.width <= image.height else (longer, self.resize)
        if new != image.size:
            image = image.resize(new, _pillow().Resampling.BILINEAR)
        left, top = round((new[0] - width) / 2.0), round((new[1] - height) / 2.0)
        return image.crop((left, top, left + width, top + height))


def picture_form(size: int | list[int] | None, resize: int | None, mode: str, layout: str) -> PictureForm:
    """The form that a job's arguments describe.

    Raises:
        JobError: they contradict each other.
    """
    if mode not in MODES or layout not in LAYOUTS:
        raise JobError(f"mode is {mode!r} and layout {layout!r}: choose of {MODES} and {LAYOUTS}")
    sides = [size] * 2 if isinstance(size, int) else size
    if sides is not None and (len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides)):
        raise JobError(f"size is {size!r}: give one number of pixels, or [height, width]")
    if resize is not None and (sides is None or resize < max(sides)):
        raise JobError(
            f"resize is {resize}: it is what the shorter side becomes before a `size` is cut out, so it needs a size "
            f"that is no larger (here {size})"
        )
    as_tuple = None if sides is None else (sides[0], sides[1])
    return PictureForm(size=as_tuple, resize=resize, mode=mode, layout=layout)  # type: ignore[arg-type]


class Decoder:
    """Decodes many pictures at once, in threads of its own: Pillow lets them run side by side. Pickles.

    Args:
        form: what the pictures are brought to.
        threads: how many; as many as the machine has cores, up to 16, when None.
    """

    def __init__(self, form: PictureForm, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise JobError(f"threads is {threads}: at least one has to decode")
        self.form = form
        self._threads = threads or min(16, os.cpu_count() or 1)
        self._pool: ThreadPoolExecutor | None = None
        self._pool_of: int | None = None
        self._lock = threading.Lock()
        _pillow()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.form, self._threads)

    def batch(self, sources: Sequence[tuple[Callable[[], Path | bytes], str]]) -> NDArray[np.uint8]:
        """Pictures as one array, [B, ...].

        Args:
            sources: for each, what gives its file or contents, and its name.
        Raises:
            UnreadableSampleError: one cannot be decoded. ShapeMismatchError: they differ in size, and no size is given.
        """
        pictures = list(self._map(sources))
        for (_, name), pixels in zip(sources, pictures, strict=True):
            if pixels.shape != pictures[0].shape:
                raise ShapeMismatchError(
                    f"pictures {sources[0][1]!r} and {name!r} have the shapes {pictures[0].shape} and {pixels.shape}: "
                    "give a `size`, and each is resized and cut to it"
                )
        return np.stack(pictures) if pictures else np.empty((0, *(self.form.size or (0, 0))), np.uint8)

    def _map(self, sources: Sequence[tuple[Callable[[], Path | bytes], str]]) -> Any:
        if self._threads == 1 or len(sources) < 2:
            return (self.form.decode(read(), name) for read, name in sources)
        return self._executor().map(lambda source: self.form.decode(source[0](), source[1]), sources)

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            # Threads do not survive a fork: a child starts its own.
            if self._pool is None or self._pool_of != os.getpid():
                self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
                self._pool_of = os.getpid()
            return self._pool


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError(
            "decoding pictures needs Pillow, which is not installed: `pip install softlabels[images]`", extra="images"
        ) from error
    return Image
