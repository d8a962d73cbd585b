"""Training data: samples packed into windows, and the order of their batches."""

from typing import TYPE_CHECKING

from jsparse.lazy import lazy_face

if TYPE_CHECKING:
    from jsparse.train.data.batches import batch_at as batch_at
    from jsparse.train.data.batches import digest_data as digest_data
    from jsparse.train.data.batches import position_at as position_at
    from jsparse.train.data.windows import TrainBatch as TrainBatch
    from jsparse.train.data.windows import Windows as Windows
    from jsparse.train.data.windows import open_windows as open_windows
    from jsparse.train.data.windows import write_windows as write_windows
else:
    __getattr__, __dir__ = lazy_face(__name__, __file__)
