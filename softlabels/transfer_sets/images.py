"""Image decoding: files or bytes to uint8 arrays of one shape, resized and centre-cropped as torchvision does it.

Shapes: B images, H height, W width, C channels.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from softlabels.errors import ShapeMismatchError, UnreadableSampleError
from softlabels.extras import needs_extra
from softlabels.transfer_sets.sources import Source

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""Files that count as images, in lower case."""

MAX_THREADS = 16
"""Upper bound of the default number of decoding threads."""

Pixels = Annotated[int, msgspec.Meta(ge=1)]
# Not tuple[Pixels, Pixels]: msgspec 0.23 crashes the interpreter on a bounded int in a union with a fixed tuple.
Size = Pixels | Annotated[list[Pixels], msgspec.Meta(min_length=2, max_length=2)]

ImageFile = Path | bytes
"""An image's file, or the contents of the file."""


class ImageDecoder:
    """Decodes images to one shape, batches in a thread pool, since Pillow releases the GIL. Can be pickled.

    Args:
        size: (height, width) of the centre crop; None keeps images as they are, all of one shape.
        resize: length of the shorter side before the crop; None takes the least that covers the crop.
        mode: "RGB", or "L" for one grey channel.
        layout: "chw" [channels, height, width], or "hwc"; grey images have a channel axis too.
        threads: number of threads; one per core, up to `MAX_THREADS`, when None.
    Raises:
        MissingExtraError: Pillow is not installed.
    """

    def __init__(
        self, size: tuple[int, int] | None, resize: int | None, mode: str, layout: str, threads: int | None = None
    ) -> None:
        self._size, self._resize, self._mode, self._layout = size, resize, mode, layout
        self._threads = threads or min(MAX_THREADS, os.cpu_count() or 1)
        self._pool: ThreadPoolExecutor | None = None
        self._pool_pid: int | None = None
        self._lock = threading.Lock()
        _pillow()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._size, self._resize, self._mode, self._layout, self._threads)

    def decode(self, source: ImageFile, name: str) -> NDArray[np.uint8]:
        """Return the pixels of an image; `name` is for messages.

        Raises:
            UnreadableSampleError: missing, corrupt, truncated, too large, or more than 8 bits a channel.
        """
        pil_image = _pillow()
        try:
            with pil_image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return self._pixels(image, name)
        except UnreadableSampleError:
            raise
        except (OSError, ValueError, SyntaxError, pil_image.DecompressionBombError) as error:
            raise UnreadableSampleError(
                f"image {name!r} cannot be decoded ({error}): restore it, or remove it from the transfer set",
                sample=name,
            ) from error

    def _pixels(self, image: Any, name: str) -> NDArray[np.uint8]:
        if image.mode.startswith(("I", "F")):
            raise UnreadableSampleError(
                f"image {name!r} has more than 8 bits a channel (mode {image.mode}), which would be lost: keep such "
                "images as arrays, in npy, Zarr or HDF5",
                sample=name,
            )
        if "transparency" in image.info:
            image = image.convert("RGBA")
        image = self._resize_and_crop(image if image.mode == self._mode else image.convert(self._mode))
        pixels_HWC: NDArray[np.uint8] = np.asarray(image).reshape(image.height, image.width, -1)
        return pixels_HWC if self._layout == "hwc" else np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))

    def _resize_and_crop(self, image: Any) -> Any:
        if self._size is None:
            return image
        height, width = self._size
        # Rounded as torchvision's Resize and CenterCrop do, which most networks were evaluated with.
        if self._resize is None:
            scale = max(height / image.height, width / image.width)
            new = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        else:
            short, long = sorted((image.width, image.height))
            longer = int(self._resize * long / short)
            new = (self._resize, longer) if image.width <= image.height else (longer, self._resize)
        if new != image.size:
            image = image.resize(new, _pillow().Resampling.BILINEAR)
        left, top = round((new[0] - width) / 2.0), round((new[1] - height) / 2.0)
        return image.crop((left, top, left + width, top + height))

    def decode_batch(self, sources: Sequence[ImageFile], names: Sequence[str]) -> NDArray[np.uint8]:
        """Return images as one array, [B, ...]; files are opened in the threads, so slow disks serve several at once.

        Raises:
            UnreadableSampleError: an image cannot be decoded.
            ShapeMismatchError: images differ in size and there is no `size`.
        """
        is_single = self._threads == 1 or len(sources) < 2
        mapped: Iterable[NDArray[np.uint8]] = (map if is_single else self._executor().map)(self.decode, sources, names)
        images = list(mapped)
        for name, pixels in zip(names, images, strict=True):
            if pixels.shape != images[0].shape:
                raise ShapeMismatchError(
                    f"images {names[0]!r} and {name!r} have the shapes {images[0].shape} and {pixels.shape}: give a "
                    "`size` to resize and crop them to"
                )
        return np.stack(images) if images else np.empty((0, *(self._size or (0, 0))), np.uint8)

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            # Threads do not survive a fork: a child process starts its own.
            if self._pool is None or self._pool_pid != os.getpid():
                self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
                self._pool_pid = os.getpid()
            return self._pool


class ImageSource(Source, frozen=True, kw_only=True):
    """Arguments that all sources of images share.

    Attributes:
        size: height and width of the centre crop, one number or [height, width]; needed if images differ in size.
        resize, mode, layout: see `ImageDecoder`.
        threads: decoding threads; one per core, up to 16, when left out.
    """

    size: Size | None = None
    resize: Pixels | None = None
    mode: Literal["RGB", "L"] = "RGB"
    layout: Literal["chw", "hwc"] = "chw"
    threads: Annotated[int, msgspec.Meta(ge=1)] | None = None

    def __post_init__(self) -> None:
        sides = self._sides()
        if self.resize is not None and (sides is None or self.resize < max(sides)):
            raise ValueError(
                f"`resize` is {self.resize}, the shorter side before a centre crop, so it needs a `size` that is no "
                f"larger; `size` is {self.size}"
            )

    def decoder(self) -> ImageDecoder:
        """Return a decoder for these arguments. Raises MissingExtraError if Pillow is not installed."""
        return ImageDecoder(self._sides(), self.resize, self.mode, self.layout, self.threads)

    def _sides(self) -> tuple[int, int] | None:
        if self.size is None:
            return None
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])


def _pillow() -> Any:
    with needs_extra("images", "decoding images"):
        from PIL import Image
    return Image
