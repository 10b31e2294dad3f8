"""scikit-learn's 1,797 digits of 8 × 8 pixels, a substitute for MNIST where that is not available.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from softlabels.errors import DataUnavailableError
from softlabels.extras import needs_extra
from softlabels.transfer_set import ArrayTransferSet

NOTICE = (
    "scikit-learn's bundled digits (1,797 images of 8 × 8 pixels) are used in place of MNIST: every step runs, but the "
    "error counts cannot be compared with MNIST or with the paper"
)
TRAIN_FRACTION = 0.8
SPLIT_SEED = 0
INK_LEVELS = 16
"""A pixel counts the dark dots of a 4 × 4 block, 0 to 16."""


def load_digits(*, split: Literal["train", "test"] = "train") -> ArrayTransferSet:
    """Return one split of the digits, in the form of `load_mnist`.

    Args:
        split: "train" (1,438 samples) or "test" (359), by a shuffle with a fixed seed.
    Returns:
        inputs uint8 [N, 8, 8] with ink from 0 to 255, labels 0 … 9, ids the positions in scikit-learn's order;
        named "digits" or "digits-test".
    Raises:
        MissingExtraError: scikit-learn is not installed.
        DataUnavailableError: no such split.
    """
    if split not in ("train", "test"):
        raise DataUnavailableError(f"the digits have the splits 'train' and 'test', not {split!r}")
    with needs_extra("demo", "loading the digits that come with scikit-learn"):
        from sklearn import datasets
    ink, labels = datasets.load_digits(return_X_y=True)
    inputs = np.round(np.reshape(ink, (-1, 8, 8)) * (255 / INK_LEVELS)).astype(np.uint8)
    order = np.random.Generator(np.random.PCG64(SPLIT_SEED)).permutation(len(inputs))
    border = round(TRAIN_FRACTION * len(inputs))
    ids = np.sort(order[:border] if split == "train" else order[border:]).astype(np.int64)
    name = "digits" if split == "train" else "digits-test"
    return ArrayTransferSet(name, inputs[ids], labels=np.asarray(labels)[ids], ids=ids)
