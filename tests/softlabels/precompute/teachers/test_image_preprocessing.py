"""Image preprocessing as a table of the job file, against Pillow and plain arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from softlabels.errors import JobError
from softlabels.precompute.teachers.image_preprocessing import ImagePreprocessing

RAW = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 37, 53, 3), dtype=np.uint8))


class TestSteps:
    @pytest.mark.parametrize(("name", "filter_name"), [("bilinear", "BILINEAR"), ("bicubic", "BICUBIC")])
    def test_resizing_is_pillows(self, name: Any, filter_name: str) -> None:
        """Within one step of 256, which Pillow rounds to and this does not."""
        image = pytest.importorskip("PIL.Image", reason="compares with Pillow")
        calm = RAW // 2 + 64  # Pillow cuts what overshoots between its two passes as well
        found = ImagePreprocessing(resize=[20, 30], interpolation=name)(calm)
        for mine, raw in zip(found, calm.numpy(), strict=True):
            theirs = image.fromarray(raw).resize((30, 20), getattr(image.Resampling, filter_name))
            np.testing.assert_allclose(mine.permute(1, 2, 0).numpy(), np.asarray(theirs), atol=1.01)

    def test_the_shorter_side_is_named(self) -> None:
        """Resized by one number, an image keeps its proportions; then the middle is taken."""
        assert ImagePreprocessing(resize=20)(RAW).shape == (2, 3, 20, 29)
        assert ImagePreprocessing(resize=20, crop=16)(RAW).shape == (2, 3, 16, 16)
        cropped = ImagePreprocessing(crop=[3, 5])(RAW)
        assert torch.equal(cropped, RAW.permute(0, 3, 1, 2)[:, :, 17:20, 24:29].float())

    def test_numbers_are_divided_then_normalised(self) -> None:
        """(x / divide_by − mean) / std, one number for all channels or one each."""
        found = ImagePreprocessing(divide_by=255, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])(RAW)
        expected = (RAW.numpy() / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
        np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), expected, atol=1e-6)

    def test_layouts(self) -> None:
        """Channels first, last or none come out as channels first."""
        first = RAW.permute(0, 3, 1, 2)
        assert torch.equal(ImagePreprocessing(layout="CHW")(first), ImagePreprocessing(layout="HWC")(RAW))
        assert ImagePreprocessing(layout="HW")(RAW[..., 0]).shape == (2, 1, 37, 53)

    def test_whole_numbers_keep_their_bounds(self) -> None:
        """Bicubic curves overshoot at an edge; bytes had no such values. Each image is bounded for itself."""
        edge = torch.zeros(2, 8, 8, 1, dtype=torch.uint8)
        edge[:, :, 4:] = 255
        found = ImagePreprocessing(resize=[8, 32], interpolation="bicubic")(edge)
        assert found.min() >= 0
        assert found.max() <= 255
        alone = ImagePreprocessing(resize=[8, 32], interpolation="bicubic")(edge[:1])
        assert torch.equal(alone[0], found[0])


class TestRefusals:
    @pytest.mark.parametrize(
        ("table", "words"),
        [
            ({"resize": 0}, "at `resize`"),
            ({"crop": [3]}, "at `crop`"),
            ({"crop": [3, 4, 5]}, "at `crop`"),
            ({"resize": 1 << 20}, "at `resize`"),
            ({"std": 0}, "at `std`"),
            ({"std": [1.0, -1.0, 1.0]}, r"> 0.* .at `std\[1\]`"),
            ({"mean": ["red"]}, r"at `mean\[0\]`"),
            ({"mean": []}, "at `mean`"),
            ({"divide_by": float("nan")}, "at `divide_by`"),
        ],
    )
    def test_numbers_out_of_bounds(self, load, table: dict[str, Any], words: str) -> None:
        """Named when the job is read, not at the first batch."""
        with pytest.raises(JobError, match=words):
            load(preprocess=table)

    @pytest.mark.parametrize(
        ("table", "words"),
        [
            ({"rezise": 3}, "did you mean `resize`"),
            ({"layout": "WHC"}, "must be one of 'CHW', 'HW', 'HWC'"),
            ({"crop": "big"}, r"got `str` .at `crop`"),
        ],
    )
    def test_keys_and_words(self, load, table: dict[str, Any], words: str) -> None:
        """An unknown key is named with the nearest known one."""
        with pytest.raises(JobError, match=words):
            load(preprocess=table)

    @pytest.mark.parametrize(
        ("steps", "images", "words"),
        [
            (ImagePreprocessing(), RAW[0], "4 axes"),
            (ImagePreprocessing(crop=64), RAW, "does not fit"),
            (ImagePreprocessing(mean=[1.0, 2.0]), RAW, "3 channels"),
        ],
    )
    def test_images_that_do_not_fit(self, steps: ImagePreprocessing, images: torch.Tensor, words: str) -> None:
        """The message says what is expected."""
        with pytest.raises(ValueError, match=words):
            steps(images)
