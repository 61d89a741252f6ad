"""Several processes that extract features apart: each computes a share of the parts, the first writes the table.

They meet once, when the job starts. From then on no process needs another to compute, so none is held up or ended by
one that dies. What they know of each other are files in a folder beside the output, which all must see: what is dealt
to whom, signs of life, and why a process gave up.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder, read_json, write_json
from perturbjax.core.messages import console
from perturbjax.training.processes import HostsConfig, connect, run_on_first_process

#: Seconds between signs of life; how long a process may give none (a network's file system may show them a minute
#: late); and between looks at what the others did.
BEAT_S, SILENT_S, LOOK_S = 5.0, 180.0, 2.0
DEALT = "dealt.json"
GO_ON = "what is done is kept, run the same command again to go on"


class Crew:
    """This process among those of its job; alone it waits for nobody and writes none of the files.

    Attributes:
        index: which of them it is, from 0.
        count: how many there are.
    """

    def __init__(self, folder: Path | None = None, index: int = 0, count: int = 1):
        self._folder, self.index, self.count = folder, index, count
        self._dealt: list[int] = []

    @property
    def folder(self) -> Path:
        """What all processes see."""
        assert self._folder is not None
        return self._folder

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes the table."""
        return self.index == 0

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Give signs of life until the block ends; where it ends in an error, tell the others which."""
        if self.alone:
            yield
            return
        over = threading.Event()
        beating = threading.Thread(target=self._beat, args=(over,), daemon=True)
        beating.start()
        try:
            yield
        except BaseException as error:
            self._give_up(str(error) or type(error).__name__)
            raise
        finally:
            over.set()
            beating.join()

    def deal(self, find: Callable[[], list[int]]) -> list[int]:
        """This process's share of the numbers that the first finds; they are dealt in turn, so that all end together.

        Raises:
            InputError: `find` raised one, or the first process gave up or is gone.
        """
        if self.first:
            self._dealt = find()
            if not self.alone:
                write_json(self.folder / DEALT, self._dealt)
                console.print(
                    f"features: {self.count} processes share {len(self._dealt)} parts; this one's:"
                )
        else:
            self._wait((self.folder / DEALT).is_file, lambda: {0})
            self._dealt = read_json(self.folder / DEALT)
        return self._dealt[self.index :: self.count]

    def wait_for_all(self, there: Callable[[int], bool]) -> None:
        """Until all that was dealt is there.

        Raises:
            InputError: a process gave up, or one whose share is not there is gone.
        """

        def owing() -> set[int]:
            return {at % self.count for at, number in enumerate(self._dealt) if not there(number)}

        self._wait(lambda: not owing(), owing)

    def dismiss(self) -> None:
        """The table is written: the first lets the others go."""
        if not self.alone:
            _remove(self.folder)

    def wait_for_first(self) -> None:
        """Until the first process has written the table.

        Raises:
            InputError: it gave up or is gone.
        """
        self._wait(lambda: not self.folder.is_dir(), lambda: {0})

    def _wait(self, ready: Callable[[], bool], on: Callable[[], Collection[int]]) -> None:
        """Until `ready`, watching the processes that are waited `on`."""
        heard: dict[int, tuple[str, int]] = {}
        while not ready():
            for other in on():
                self._require_alive(other, heard)
            time.sleep(LOOK_S)

    def _require_alive(self, other: int, heard: dict[int, tuple[str, int]]) -> None:
        """`heard` is what it last said, and for how many looks: the clocks of two machines need not agree, and one that
        was stopped for a while itself has not looked."""
        name = f"process {other} (of 0 to {self.count - 1})"
        if words := _text(self._word_of(other)):
            raise InputError(f"{name} gave up ({words}); {GO_ON}")
        said = _text(self.folder / f"alive-{other}")
        last, looks = heard.get(other, (said, 0))
        heard[other] = said, looks + 1 if said == last else 0
        if heard[other][1] * LOOK_S > SILENT_S:
            raise InputError(
                f"{name} gave no sign of life in {self.folder} for {SILENT_S:.0f} s; {GO_ON}"
            )

    def _word_of(self, process: int) -> Path:
        return self.folder / f"gave-up-{process}"

    def _beat(self, over: threading.Event) -> None:
        beats = 0
        while not over.is_set():
            with suppress(OSError):  # the next one may succeed; after too many the others say so
                (self.folder / f"alive-{self.index}").write_text(str(beats))
            beats += 1
            over.wait(BEAT_S)

    def _give_up(self, words: str) -> None:
        """Leave a word why; who leaves the last one clears up."""
        with suppress(OSError):
            self._word_of(self.index).write_text(words)
            if all(self._word_of(process).is_file() for process in range(self.count)):
                _remove(self.folder)


def meet(hosts: HostsConfig, out: Path) -> Crew:
    """Join the job, start together, and go apart; where there is no job, a crew of one. Before JAX looks for devices.

    Raises:
        InputError: as of `connect`, or the first process cannot write beside `out`.
    """
    if not hosts.distributed:
        return Crew()
    # With it JAX keeps SIGTERM to itself, for all processes to end at the same step; here each ends alone.
    jax.config.update("jax_enable_preemption_service", False)
    connect(hosts)
    folder = out.with_name(f".{out.name}.processes")

    def start() -> None:
        _remove(folder)
        make_folder(folder)

    run_on_first_process(start, like=None)
    crew = Crew(folder, jax.process_index(), jax.process_count())
    jax.distributed.shutdown()  # else JAX would end every process some time after one has died
    if crew.alone:
        _remove(folder)
    return crew


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _remove(folder: Path) -> None:
    """At once for all who look, whatever a process is still writing there."""
    gone = folder.with_name(f"{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
