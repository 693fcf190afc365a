"""Encoded rows that tests write down."""

from collections.abc import Sequence

import numpy as np

from fedpeft.data.batching import Examples, flat


def labelled(rows: Sequence[Sequence[int]], labels: Sequence[int], pad_id: int) -> Examples:
    """Return training rows of one sequence and one label each.

    Args:
        rows: token ids of each row.
        labels: class numbers.
        pad_id: the tokenizer's padding token.
    """
    arrays = flat(rows) | {"labels": np.asarray(labels, np.int64)}
    return Examples.whole(arrays, "train", pad_id)
