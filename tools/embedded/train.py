"""Trains the embedded model: resumes from its checkpoint and ends at a time you name.

The learning rate warms up, stays, and falls to zero over the last `--decay-minutes` before
`--finish-by`, or over the last `--decay-tokens` before `--end-tokens`, whichever ends first; so the run
may be stopped, continued or shortened at will, and a count of tokens bears pauses as well. A file
`control.json` in the work folder is read again before each step and may change the shares of
data and the end.
"""

import argparse
import json
import multiprocessing
import random
import signal
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from datetime import time as time_of_day
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tools.embedded import checkpoint, data
from tools.embedded.model import LanguageModel, ModelConfig
from tools.embedded.optimizer import make_optimizers
from tools.embedded.team import Team

SAVE_SECONDS = 240
LOG_STEPS = 10


@dataclass(slots=True, kw_only=True)
class Control:
    """What may change during a run, from `control.json`; absent keys keep these values."""

    finish_by: str = ""  # HH:MM local time; empty means never
    decay_minutes: float = 20.0
    end_tokens: int = 0  # of the whole run, those before a restart included; 0 means never
    decay_tokens: int = 1
    learning_rate: float = 0.004
    warmup_steps: int = 60
    warmup_from: int = 0  # the step at which the rate begins to rise
    book_share: float = 0.55  # of rows
    copy_share: float = 0.05  # of rows
    answer_share: float = 0.0  # of rows; what a draft's target said
    copy_size_max: int = 80  # tokens of a passage in a copy row
    tokens_per_step: int = 8192
    row_length: int = 512  # a multiple of 512
    long_share: float = 0.02  # of steps, before the decay
    long_share_decay: float = 0.25  # of steps, during the decay
    shares: dict[str, float] | None = None  # of the kinds of instruction

    def minutes_left(self, started: datetime) -> float:
        """Minutes until the end; a time of day before the start means the next day."""
        if not self.finish_by:
            return float("inf")
        clock = time_of_day.fromisoformat(self.finish_by)
        end = datetime.combine(started.date(), clock, started.tzinfo)
        if end < started:
            end += timedelta(days=1)
        return (end - datetime.now().astimezone()).total_seconds() / 60

    def decay_left(self, started: datetime, num_tokens: int) -> float:
        """How much of the decay is to come, above 1 before it begins; 0 or less ends the run."""
        left = self.minutes_left(started) / self.decay_minutes
        if self.end_tokens:
            left = min(left, (self.end_tokens - num_tokens) / self.decay_tokens)
        return left

    def rate(self, step: int, decay_left: float) -> float:
        """Learning rate of a step."""
        warm = max(0.0, min(1.0, (step + 1 - self.warmup_from) / self.warmup_steps))
        return self.learning_rate * warm * max(0.0, min(1.0, decay_left))


def read_control(path: Path, base: dict[str, Any]) -> Control:
    """The command line's values, overridden by the control file. Any: JSON values."""
    override = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return Control(**{**base, **override})


@dataclass(slots=True, kw_only=True)
class Progress:
    """Counters of a run; saved in the checkpoint."""

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    cursor: dict[str, int] = field(default_factory=dict)


class Trainer:
    """Holds model, optimizers and data of one run."""

    def __init__(self, arguments: argparse.Namespace, team: Team) -> None:
        self.arguments = arguments
        self.team = team
        self.device = torch.device(arguments.device)
        torch.manual_seed(arguments.seed)
        self.model = self.new_model().to(self.device)
        self.optimizers = make_optimizers(self.model, team)
        self.progress = Progress()
        self.started = datetime.now().astimezone()
        self.stop_requested = False
        names = ("decay_minutes", "finish_by", "decay_tokens", "end_tokens")
        self.base = {name: getattr(arguments, name) for name in names}
        tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
        self.held_out = data.encode_held_out(tokenizer, arguments.corpus)
        self.rows = data.RowSource(
            tokenizer=tokenizer,
            book_ids=data.cached_books(tokenizer, arguments.corpus, arguments.work_dir / "books.npy"),
            paragraphs=data.load_paragraphs(arguments.corpus),
            cursor=data.Cursor(),
        )

    def new_model(self) -> LanguageModel:
        """The network before its first step."""
        return LanguageModel(ModelConfig())

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """What a step makes smaller; both `[rows, length]` int64."""
        return self.model.loss(ids, targets)

    @property
    def checkpoint(self) -> Path:
        """Where the run is saved."""
        path: Path = self.arguments.work_dir / "checkpoint.safetensors"
        return path

    def save(self) -> None:
        """Write the checkpoint; a reader never sees half of one."""
        self.progress.cursor = asdict(self.rows.cursor)
        checkpoint.write(
            self.checkpoint,
            model=self.model,
            optimizers=self.optimizers,
            progress=asdict(self.progress),
        )

    def resume(self) -> None:
        """Continue from the checkpoint if there is one."""
        if not self.checkpoint.exists():
            return
        saved = checkpoint.read(self.checkpoint)
        checkpoint.restore(saved, model=self.model, optimizers=self.optimizers)
        self.progress = Progress(**saved.progress)
        self.rows.cursor = data.Cursor(**self.progress.cursor)
        print(f"resumed at step {self.progress.step}", flush=True)

    def batch(self, control: Control, *, is_decaying: bool) -> tuple[Tensor, Tensor]:
        """Ids and targets of the next step, each `[rows, length]` int64."""
        rng = random.Random(f"batch:{self.progress.step}")  # noqa: S311  # a data set
        self.rows.shares, self.rows.copy_size_max = control.shares, control.copy_size_max
        long_share = control.long_share_decay if is_decaying else control.long_share
        length = rng.choice((2048, 4096)) if rng.random() < long_share else control.row_length
        num_rows = max(self.team.size, control.tokens_per_step // length)
        rows = self.team.share([self.row(rng.random(), control, length) for _ in range(num_rows)])
        ids = torch.stack([torch.from_numpy(row.ids) for row in rows]).long()
        targets = torch.stack([torch.from_numpy(row.targets) for row in rows]).long()
        return ids.to(self.device), targets.to(self.device)

    def row(self, dice: float, control: Control, length: int) -> data.Row:
        """A row of the kind that `dice`, uniform in [0, 1), falls on."""
        if dice < control.book_share:
            return self.rows.book_row(length)
        if dice < control.book_share + control.copy_share:
            return self.rows.copy_row(length)
        return self.rows.chat_row(length)

    def step(self, control: Control, decay_left: float) -> float:
        """One update; returns its loss."""
        ids, targets = self.batch(control, is_decaying=decay_left < 1)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.loss(ids, targets)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.team.average_gradients(self.model)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = control.rate(self.progress.step, decay_left)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.num_tokens += ids.numel() * self.team.size
        return loss.item()

    @torch.no_grad()
    def held_out_loss(self, *, num_rows: int = 16) -> float:
        """Mean loss on the start of the held-out book, for the log alone."""
        ids = torch.from_numpy(self.held_out[: num_rows * 512 + 1]).long().to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.model.loss(ids[:-1].view(-1, 512), ids[1:].view(-1, 512))
        return loss.item()

    def decide(self) -> dict[str, Any]:
        """What the next step uses, as the first process sees it. Any: a small record."""
        control = read_control(self.arguments.work_dir / "control.json", self.base)
        decay_left = control.decay_left(self.started, self.progress.num_tokens)
        is_last = self.stop_requested or decay_left <= 0
        return self.team.agree({"control": asdict(control), "decay_left": decay_left, "is_last": is_last})

    def run(self) -> None:
        """Train until the end; the first process logs and saves on the way."""
        saved_at = time.monotonic()
        recent: list[float] = []
        while not (decision := self.decide())["is_last"]:
            control, decay_left = Control(**decision["control"]), decision["decay_left"]
            begun = time.monotonic()
            recent.append(self.step(control, decay_left))
            self.progress.seconds += time.monotonic() - begun
            if self.team.rank == 0 and self.progress.step % LOG_STEPS == 0:
                self._log(recent, control)
                recent.clear()
            if self.team.rank == 0 and time.monotonic() - saved_at > SAVE_SECONDS:
                self._save_and_report("saved")
                saved_at = time.monotonic()
        if self.team.rank == 0:
            self._save_and_report("ended")

    def _save_and_report(self, event: str) -> None:
        self.save()
        print(f"{event}; held-out loss {self.held_out_loss():.3f}", flush=True)

    def _log(self, recent: list[float], control: Control) -> None:
        progress = self.progress
        rate = control.rate(progress.step, control.decay_left(self.started, progress.num_tokens))
        now = datetime.now().astimezone()
        print(
            f"{now:%H:%M:%S} step {progress.step} tokens {progress.num_tokens / 1e6:.2f}M"
            f" loss {sum(recent) / len(recent):.3f} lr {rate:.5f}"
            f" {progress.num_tokens / progress.seconds:.0f} tok/s",
            flush=True,
        )


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """What every training run is told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of tokenizer.json")
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoint and control file")
    parser.add_argument("--finish-by", default="", help="HH:MM, local time")
    parser.add_argument("--decay-minutes", type=float, default=20.0)
    parser.add_argument("--end-tokens", type=int, default=0, help="0: the time alone ends the run")
    parser.add_argument("--decay-tokens", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="one per core on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--seed", type=int, default=7)
    return parser


def work(make: type[Trainer], arguments: argparse.Namespace, team: Team) -> None:
    """One process of the run; SIGTERM to the first saves and ends all."""
    torch.set_num_threads(arguments.threads)
    team.join(arguments.work_dir / "meeting")
    trainer = make(arguments, team)

    def request_stop(_signal: int, _frame: object) -> None:
        trainer.stop_requested = True

    signal.signal(signal.SIGTERM, request_stop)
    trainer.resume()
    trainer.run()


def train(make: type[Trainer], arguments: argparse.Namespace) -> None:
    """Run a trainer in as many processes as the arguments say; this one is the first."""
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    (arguments.work_dir / "meeting").unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    size = arguments.processes
    for rank in range(1, size):
        others = (make, arguments, Team(rank=rank, size=size))
        context.Process(target=work, args=others, daemon=True).start()
    work(make, arguments, Team(rank=0, size=size))


if __name__ == "__main__":
    train(Trainer, argument_parser(__doc__).parse_args())
