"""Progress of a run: a live display on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedpeft.reporting.observer import OUTCOMES, SPREAD, UNWEIGHTED, Observer


def line_text(line: Mapping[str, Any], num_rounds: int) -> str:
    """Return a round as one line of text."""
    parts = [f"round {line['round']}/{num_rounds}", *_replied(line)]
    starts = {"train_loss": "train loss", "validation_": "", "client_validation_": "clients' "}
    for start, text in starts.items():
        for key in line:
            if key.startswith(start) and not key.endswith(("_baseline", *SPREAD)):
                name = key.removeprefix(start) if start.endswith("_") else ""
                name = "validation loss" if key == "validation_loss" else name.replace("_", " ")
                parts.append(f"{text}{name} {line[key]:.4f}")
    if line.get("uplink_bytes"):
        parts.append(f"sent {(line['uplink_bytes'] + line['downlink_bytes']) / 1e6:.2f} MB")
    parts.append(f"{line['seconds']:.1f} s")
    return "  ".join(parts)


def _replied(line: Mapping[str, Any]) -> list[str]:
    """Say how many clients replied, for each phase in which some did not."""
    texts = []
    for start, verb in (("", "replied"), ("evaluation_", "measured")):
        counts = [line.get(f"{start}{outcome}_clients", 0) for outcome in OUTCOMES]
        if counts[0] < sum(counts):
            texts.append(f"{counts[0]} of {sum(counts)} {verb}")
    return texts


def summary_text(summary: Mapping[str, Any]) -> str:
    """Return a run's summary as a few lines of text."""
    final, sent, lines = summary["final"], summary["bytes"], []
    if summary["weights"] == "RANDOM":
        lines.append("RANDOM WEIGHTS: a dry run, its measures say nothing about the model")
    if stopped := summary.get("stopped_early"):
        lines.append(f"ended early after round {stopped['round']}: {stopped['reason']}")
    for key in sorted(final):
        if key.startswith(("test_", "client_test_")) and not key.endswith(SPREAD):
            best = summary["best"].get(key)  # some are measured after the last round alone
            at_best = "" if best is None else f" (best round {best:.4f})"
            lines.append(f"{key}: {_number(final[key])}{at_best}{_spread(final, key)}")
    for reason, count in summary["data"]["skipped"].items():
        lines.append(f"left out: {count} rows, each {reason}")
    for split, counts in summary["data"]["cut"].items():
        cut = ", ".join(f"{count} {key.removeprefix('cut_')}s" for key, count in counts.items())
        lines.append(f"cut to data.max_length in {split}: {cut}")
    up, down = sent["uplink_bytes"] / 1e6, sent["downlink_bytes"] / 1e6
    lines.append(f"sent up {up:.3f} MB, down {down:.3f} MB, {summary['seconds']:.0f} s")
    lines.append(f"shared_state_sha256: {summary['shared_state_sha256']}")
    lines.append(f"results: {summary['run_dir']}")
    return "\n".join(lines)


def _spread(measures: Mapping[str, Any], key: str) -> str:
    """Say how a measure spreads over the clients; nothing for the server's own."""
    if key + UNWEIGHTED not in measures:
        return ""
    unweighted, worst, p10 = (measures[key + suffix] for suffix in SPREAD)
    return (
        f"; mean by rows. By clients: mean {_number(unweighted)}, 10th percentile {_number(p10)}, "
        f"worst {_number(worst)}"
    )


def _number(value: float | None) -> str:
    """Return a measure as text; the summary has null for a measure that is not finite."""
    return "not finite" if value is None else f"{value:.4f}"


class Display(Observer):
    """Shows rounds, clients, loss and the time left.

    Args:
        console: the console to write to; null for standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self._live: Progress | None = None
        self._started = time.monotonic()
        self._earlier: int | None = None

    @classmethod
    def beside_json(cls, as_json: bool, quiet: bool = False) -> "Display":
        """Return a display on standard output; on standard error if JSON goes to the output."""
        return cls(Console(soft_wrap=True, stderr=as_json, quiet=quiet))

    def show(self, text: str) -> None:
        """Show a line as it is; brackets, as in ``targets=[q,k,v]``, are no markup."""
        self.console.print(text, markup=False, emoji=False, highlight=False)

    def start(self, title: str, num_rounds: int) -> None:
        """Begin a run."""
        self.num_rounds, self._started, self._earlier = num_rounds, time.monotonic(), None
        self.show(title)
        if self.console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._live.start()
            self._rounds = self._live.add_task("rounds", total=num_rounds)
            self._clients = self._live.add_task("clients", total=None)

    def note(self, text: str) -> None:
        """Show a note on the run."""
        self.show(f"note: {text}")

    def phase(self, name: str, clients: int) -> None:
        """Begin to wait for this many clients."""
        if self._live is not None:
            self._live.reset(self._clients, description=name, total=clients)

    def clients_done(self, count: int) -> None:
        """Show that this many more clients replied."""
        if self._live is not None:
            self._live.advance(self._clients, count)

    def round_done(self, line: Mapping[str, Any]) -> None:
        """Show a round that ended."""
        text = line_text(line, self.num_rounds)
        done = line["round"]
        if self._live is not None:
            self._live.update(self._rounds, completed=done)
        elif done > (before := self._before_this_start(done)):
            left = (time.monotonic() - self._started) / (done - before) * (self.num_rounds - done)
            text += f"  about {left:.0f} s left" if left >= 1 else ""
        self.show(text)
        if "repeated" in line:
            self.show(f"  repeated, because {line['repeated']}")
        for client, reason in line.get("refused", {}).items():
            self.show(f"  client {client} was left out: {reason}")
        if line.get("restarted"):
            clients = ", ".join(map(str, line["restarted"]))
            self.show(f"  kept state was lost and began anew: clients {clients}")

    def _before_this_start(self, round: int) -> int:
        """Return how many rounds an earlier start had done; ``round`` has just ended."""
        if self._earlier is None:
            self._earlier = max(0, round - 1)
        return self._earlier

    def stop(self, status: str = "completed", reason: str = "") -> None:
        """End a run; the command itself says the reason."""
        if self._live is not None:
            self._live.stop()
            self._live = None


DONE, SKIPPED, FAILED = "done", "skipped", "failed"  # outcomes of a run among several


@dataclass
class Tally:
    """The runs of a sweep or a study, counted as they end.

    Args:
        total: number of runs; null if it is not known.
        done: runs that came to their end now.
        skipped: runs whose results were there.
        failed: runs that an error ended, now or earlier.
        earlier: number of ``failed`` runs that an earlier command ran, so they took no time now.
        started: time at which the first run began, in seconds since 1970.
    """

    total: int | None
    done: int = 0
    skipped: int = 0
    failed: int = 0
    earlier: int = 0
    started: float = field(default_factory=time.time)

    def add(self, failed: bool) -> None:
        """Count a run that ended."""
        self.failed += failed
        self.done += not failed

    def text(self) -> str:
        """Return the counts and the time left as one line."""
        of = "" if self.total is None else f" of {self.total}"
        counts = f"{self.done + self.skipped}{of} runs done, {self.skipped} of them skipped"
        return f"{counts}, {self.failed} failed{self._left()}"

    def stopped(self, command: str) -> str:
        """Say how far the runs are, and which command goes on."""
        of = "" if self.total is None else f" of {self.total}"
        return f"stopped with {self.done + self.skipped}{of} runs done, this goes on: {command}"

    def _left(self) -> str:
        ran = self.done + self.failed - self.earlier
        left = 0 if self.total is None else self.total - self.done - self.failed - self.skipped
        if not self.done or not left:
            return ""
        return f", about {duration((time.time() - self.started) / ran * left)} left"


def duration(seconds: float) -> str:
    """Return a time in its natural unit: ``40 s``, ``12 min`` or ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
