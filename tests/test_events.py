"""TensorBoard events: complete after every write."""

import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from softprompt.storage.events import Events


def read_events(path):
    """Read a file of TFRecords: length, checksum, content, checksum."""
    content, events = path.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    return events


def test_values_are_in_the_file_after_each_write(tmp_path):
    events = Events(tmp_path / "tensorboard", step=7)
    for step in (7, 8):
        events.write(step, {"train/loss": step / 2})
        (path,) = (tmp_path / "tensorboard").iterdir()
        written = read_events(path)[-1]
        (value,) = written.summary.value
        assert (written.step, value.tag) == (step, "train/loss")
        assert value.simple_value == pytest.approx(step / 2)
    events.close()
    events.close()
    assert read_events(path)[2].session_log.status == 1  # START: hide later values of older files
