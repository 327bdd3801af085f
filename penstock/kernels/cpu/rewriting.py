"""What the passes share: who touches a buffer, and a rewriting of a tape that is applied at once.

A pass looks at the tape it was given only and writes its changes down; `Rewriting.apply` makes the new tape.
"""

from dataclasses import dataclass, field, replace

from penstock.kernels.cpu.tape import Buffer, Operation, Role, Slice, Tape


@dataclass(frozen=True, slots=True)
class Uses:
    """For each buffer the operations that read and write it, as indices in rising order."""

    readers: tuple[tuple[int, ...], ...]
    writers: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tape: Tape) -> "Uses":
        """Look at every operation once."""
        readers: list[dict[int, None]] = [{} for _ in tape.buffers]
        writers: list[dict[int, None]] = [{} for _ in tape.buffers]
        for i, operation in enumerate(tape.operations):
            for place in operation.read():
                readers[place.buffer][i] = None
            for place in operation.written():
                writers[place.buffer][i] = None
        return cls(tuple(tuple(each) for each in readers), tuple(tuple(each) for each in writers))

    def only_writer(self, buffer: int) -> int | None:
        """The one operation that writes it; None if there are none or several."""
        found = self.writers[buffer]
        return found[0] if len(found) == 1 else None

    def is_read_by(self, buffer: int, reader: int) -> bool:
        """True if that operation and no other reads it."""
        return self.readers[buffer] == (reader,)


@dataclass(slots=True)
class Rewriting:
    """Changes to a tape."""

    tape: Tape
    replaced: dict[int, list[Operation]] = field(default_factory=dict)
    """Operations by index and what stands there instead; nothing, if it goes."""
    renamed: dict[int, int] = field(default_factory=dict)
    """Buffers and those that take their place, also in chains."""
    buffers: list[Buffer] = field(default_factory=list)
    """New ones, numbered after those of the tape."""

    def drop(self, index: int) -> None:
        """Leave an operation out."""
        self.replaced[index] = []

    def put(self, index: int, *operations: Operation) -> None:
        """Set what stands in place of an operation."""
        self.replaced[index] = list(operations)

    def current(self, index: int) -> Operation:
        """What stands there now: the last of the operations that replaced it, or the first one."""
        return self.replaced[index][-1] if index in self.replaced else self.tape.operations[index]

    def add_buffer(self, buffer: Buffer) -> Slice:
        """A new buffer, whole."""
        self.buffers.append(buffer)
        return Slice(buffer=len(self.tape.buffers) + len(self.buffers) - 1, col=0, cols=buffer.cols)

    def name(self, buffer: int) -> int:
        """The buffer that takes the place of `buffer`, or itself."""
        while buffer in self.renamed:
            buffer = self.renamed[buffer]
        return buffer

    def apply(self) -> Tape:
        """The changed tape."""
        operations = [
            operation
            for i, before in enumerate(self.tape.operations)
            for operation in self.replaced.get(i, [before])
        ]
        if self.renamed:
            operations = [operation.moved(self._moved) for operation in operations]
        return replace(self.tape, buffers=(*self.tape.buffers, *self.buffers), operations=tuple(operations))

    def _moved(self, place: Slice) -> Slice:
        buffer = self.name(place.buffer)
        return place if buffer == place.buffer else replace(place, buffer=buffer)


def is_own(tape: Tape, place: Slice) -> bool:
    """True if the slice is a whole buffer that no run brings."""
    return tape.is_whole(place) and tape.buffers[place.buffer].role is Role.OWN
