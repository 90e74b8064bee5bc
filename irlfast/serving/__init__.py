"""A learned reward behind HTTP: JSON in, numbers out, judged in batches, replaced without a request lost.

requests.py    JSON bodies as rows to judge, and scores as JSON
batcher.py     a bounded queue, and batches that form while the model is busy
served.py      a reward ready to answer, and its version
live.py        the reward in service, the trial of a new one and the exchange
metrics.py     counters and histograms as Prometheus reads them
app.py         routes, access, errors
run.py         socket, signals, an end that answers what it took
"""

from .app import AppOptions
from .batcher import Batcher, QueueFullError
from .live import LiveReward, ReloadError
from .run import ServerOptions, serve
from .served import LoadOptions, ServedReward, load

__all__ = [
    "AppOptions",
    "Batcher",
    "LiveReward",
    "LoadOptions",
    "QueueFullError",
    "ReloadError",
    "ServedReward",
    "ServerOptions",
    "load",
    "serve",
]
