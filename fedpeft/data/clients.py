"""The encoded rows of a run, whole and by client, read once in a process."""

import hashlib
import math
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from fedpeft.config.schema import Config
from fedpeft.data.batching import Examples
from fedpeft.data.partitions.base import own_splits
from fedpeft.errors import named_row


class ClientRows:
    """The encoded rows of a configuration, whole and by client.

    Args:
        config: the run.
        processor: the model's tokenizer or image processor.
        owns_all_rows: true if the data are one client's, undivided.
        limit: tokens of a row that the model can read; null if any number.
    """

    def __init__(
        self, config: Config, processor: Any, owns_all_rows: bool, limit: int | None = None
    ) -> None:
        self.config, self.task, self.processor = config, config.data, processor
        self.owns_all_rows, self.limit = owns_all_rows, limit
        # The caches belong to the object, because the class's would keep every object alive.
        self.examples = lru_cache(maxsize=None)(self._examples)
        self.client_examples = lru_cache(maxsize=256)(self._client_examples)

    def _examples(self, split: str) -> Examples:
        """Return a split of the whole data set.

        Raises:
            ValueError: the model cannot read so many tokens as a row has.
        """
        examples = self.task.encode(split, self.processor)
        row, tokens = self.task.longest(examples)
        if self.limit is not None and tokens > self.limit:
            raise ValueError(
                f"{named_row(row, split)} needs {tokens} positions, those of generated tokens "
                f"included, and the model has {max(self.limit, 0)} for them: set data.max_length "
                f"to at most {max(self.limit, 0)}"
            )
        return examples

    def read_all(self) -> None:
        """Read and encode every split, so that what is wrong with one ends a run before it begins.

        Raises:
            ValueError: a split is missing, or a row of it cannot be used.
        """
        for split in self.task.splits:
            self.examples(split)

    @cached_property
    def by_client(self) -> list[np.ndarray]:
        """Numbers of each client's rows in the training split, int64."""
        if self.owns_all_rows:
            return [np.arange(len(self.examples("train")))] * self.config.num_clients
        partition = self.config.partition
        groups = self.task.group_numbers(partition.column)
        return partition.once(groups, self.config.num_clients, self.config.seed)

    def left_over(self) -> list[str]:
        """Return a sentence on training rows that no client holds; none if there are none."""
        whole = len(self.examples("train"))
        left = whole - len(np.unique(np.concatenate(self.by_client)))
        return [f"no client holds {left} of the {whole} training rows"] if left else []

    @cached_property
    def partition_sha256(self) -> str:
        """Hash of who holds which rows."""
        ends = np.cumsum([len(rows) for rows in self.by_client])
        numbers = np.concatenate([ends, *self.by_client]).astype("<i8")
        return hashlib.sha256(numbers.tobytes()).hexdigest()

    def held(self, clients: Iterable[int]) -> dict[str, list[Any]]:
        """Count rows by client and label, of which ``partition.column`` may name another column.

        Args:
            clients: the clients' numbers.

        Returns:
            Columns ``client``, ``label`` and ``rows``; a count of zero has no entry.
        """
        column, task = self.config.partition.column, self.task
        numbers = task.group_numbers(column)
        names = task.remembered(f"groups of {column}", lambda: task.grouped(column)[1])
        table: dict[str, list[Any]] = {"client": [], "label": [], "rows": []}
        for client in clients:
            counts = np.bincount(numbers[self.by_client[client]])
            for label in np.flatnonzero(counts):
                table["client"].append(client)
                table["label"].append(names[label])
                table["rows"].append(int(counts[label]))
        return table

    def _client_examples(self, client: int) -> dict[str, Examples]:
        """Return a client's train, validation and test rows."""
        if not 0 <= client < self.config.num_clients:
            raise ValueError(
                f"partition-id must be from 0 to num_clients - 1 = {self.config.num_clients - 1}, "
                f"got {client}"
            )
        limit = self.config.evaluation.max_client_rows
        splits = own_splits(self.by_client[client], self.config.seed, client)
        train = self.examples("train")
        return {
            name: train.select(rows if name == "train" else rows[:limit])
            for name, rows in splits.items()
        }

    def training(self, client: int) -> tuple[Examples, int | None]:
        """Return a client's training rows and its steps in a round.

        Null steps stand for ``local_epochs`` passes over the rows. If the strategy pools, the rows
        are all clients', and the steps are those of a whole cohort.

        Raises:
            ValueError: the strategy pools, but the data are one client's.
        """
        config = self.config
        if not config.strategy.pooled:
            return self.client_examples(client)["train"], config.local_steps
        if self.owns_all_rows:
            raise ValueError("strategy=centralized needs all rows in one place: simulate it")
        rows = [self.client_examples(c)["train"].rows for c in range(config.num_clients)]
        pooled = self.examples("train").select(np.concatenate(rows))
        if config.local_steps is not None:
            return pooled, config.local_steps * config.cohort_size()
        batches = math.ceil(len(pooled) / config.batch_size) * (config.local_epochs or 1)
        return pooled, max(1, round(batches * config.cohort_size() / config.num_clients))
