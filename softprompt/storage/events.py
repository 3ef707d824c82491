"""TensorBoard events, written at once.

`tensorboardX.SummaryWriter` writes in a thread through a queue between processes. On a full disk
the thread dies, and the writer then waits for it forever.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Events:
    """A file of TensorBoard events.

    Args:
      folder: the folder of a run's event files; it is created if necessary.
      step: the step at which the run starts or resumes. TensorBoard hides later values in older
        files of the folder.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(exist_ok=True)
        self._writer, self._closed = EventsWriter(str(folder / "events")), False
        self._writer.write_event(Event(step=step, file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=step, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write values by name, measured at a step."""
        for name, value in values.items():
            event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Close the file. Closing it again has no effect."""
        if not self._closed:
            self._closed = True
            self._writer.close()
